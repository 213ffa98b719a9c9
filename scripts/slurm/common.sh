# Sourced by the job scripts. `start_training NODELIST NUM_NODES ARGUMENTS` starts a program on these nodes, and returns
# its exit status: the recipe, or what TRAIN names, "-m trl_grpo_ext.grpo" or a script of your own. The recipe and the
# module know which run it is, and whether there is a checkpoint of it to go on from; another script gets its arguments
# alone.

start_training() {
  local nodelist="$1" num_nodes="$2" launch="${LAUNCH:-recipes/accelerate/multi_node.yaml}"
  local program resume=()
  shift 2
  read -ra program <<<"${TRAIN:-recipes/gsm8k.py}"
  case "${program[*]}" in
    *recipes/gsm8k.py | "-m trl_grpo_ext.grpo") resume=(--resume_from_checkpoint auto) ;;
  esac
  MAIN_NODE="$(scontrol show hostnames "$nodelist" | head -n 1)"
  # The port depends on the job, so that two jobs may share a node.
  MAIN_PORT="$((20000 + SLURM_JOB_ID % 10000))"
  export MAIN_NODE MAIN_PORT
  # Ends all nodes when one has failed. SLURM_PROCID is the node's number, because each node has one task.
  srun --nodes "$num_nodes" --ntasks "$num_nodes" --ntasks-per-node 1 --nodelist "$nodelist" --kill-on-bad-exit 1 \
    bash -c 'exec accelerate launch --config_file "$1" --num_machines "$2" --num_processes "$(($2 * SLURM_GPUS_ON_NODE))" \
      --machine_rank "$SLURM_PROCID" --main_process_ip "$MAIN_NODE" --main_process_port "$MAIN_PORT" \
      "${@:3}"' _ "$launch" "$num_nodes" "${program[@]}" "${resume[@]}" "$@"
}
