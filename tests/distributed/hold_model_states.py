"""What a rank holds of a model in training, in bytes: `accelerate launch hold_model_states.py CONFIGS.json OUT.json`.

Plain DeepSpeed, bf16, Adam: one optimizer step, and then the moment before the next one. All tensors that are alive
are counted, each storage once; what was alive before, and the buffers through which DeepSpeed sends, are left out.
"""

import gc
import json
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def storages():
    """All storages that tensors have, by address."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                for tensor in (thing, thing.grad if thing.is_leaf else None):  # a gradient that nobody else refers to
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage
    return found


def held_bytes(config, stage):
    before = storages()  # kept, so that nothing new gets their addresses
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    bucket = 1_000
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_live_parameters": 0,
            },
        },
    )
    del model
    ids = torch.arange(8).unsqueeze(0)
    for _ in range(3):  # an optimizer step, and half of the next one
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    del loss
    gc.collect()
    held = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    engine.destroy()
    return {"parameters": num_parameters, "held": held}


def main(configs_file, out_file):
    deepspeed.init_distributed("gloo")
    results = {}
    for name, config in json.loads(Path(configs_file).read_text()).items():
        results[name] = {stage: held_bytes(config, stage) for stage in (1, 2, 3)}
        gc.collect()
    if torch.distributed.get_rank() == 0:
        Path(out_file).write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
