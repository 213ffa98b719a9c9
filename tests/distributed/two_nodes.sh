# Runs a command among two nodes: network namespaces joined by a cable, with the addresses 10.77.0.1 and 10.77.0.2.
# Begin it with `unshare --user --map-root-user --net --mount --kill-child --fork`: what it makes is gone when it ends.
set -euo pipefail
mount -t tmpfs none /run
mkdir /run/netns
for node in 0 1; do
  ip netns add "node$node"
  ip -n "node$node" link set lo up
done
ip link add cable netns node0 type veth peer name cable netns node1
for node in 0 1; do
  ip -n "node$node" addr add "10.77.0.$((node + 1))/24" dev cable
  ip -n "node$node" link set cable up
done
"$@"
