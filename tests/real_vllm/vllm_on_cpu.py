"""vLLM on a CPU, able to take new weights. A worker's extension of `vllm serve`, and imported by whoever trains.

On a GPU nothing of this is needed. On a CPU vLLM packs the weights of linear layers for oneDNN and drops them, so that
none can be loaded into them; and weights go to a server over NCCL alone, which TRL's client does not even try without
CUDA. Here linear layers keep their weights, and the store at which trainer and workers meet hands the weights on. All
else is vLLM's and TRL's own: the server's endpoints, the client's calls, the names of the weights, what loads them.
"""

from types import SimpleNamespace

import torch
import vllm.model_executor.layers.utils as layers
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


def keep_weight(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


layers.dispatch_cpu_unquantized_gemm = keep_weight


class StoreWeightTransferEngine(NCCLWeightTransferEngine):
    """A worker's side: told what the backend "nccl" is told, and given the weights one by one by the group's store."""

    def init_transfer_engine(self, init_info):
        rank = init_info.rank_offset + self.parallel_config.rank
        self.model_update_group = StatelessProcessGroup.create(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))  # and no accelerator to wait for

    def receive_weights(self, update_info):
        for name, shape in zip(update_info.names, update_info.shapes, strict=True):
            self.model.load_weights([(name, self.model_update_group.broadcast(torch.empty(shape), 0))])


WeightTransferEngineFactory.register_engine("store", StoreWeightTransferEngine)


class Extension:
    """Named as the worker's extension, so that a server's workers import this module."""


def send_through_store() -> None:
    """Have TRL's client send weights to a server whose backend is "store"."""
    from trl.generation import vllm_client

    def open_group(init_info):
        group = StatelessProcessGroup.create(
            init_info["master_address"], init_info["master_port"], 0, init_info["world_size"]
        )
        return SimpleNamespace(group=group)

    def send(iterator, group, src, post_iter_func):
        for item in iterator:
            group.group.broadcast(post_iter_func(item), src)

    init_communicator = vllm_client.VLLMClient.init_communicator
    vllm_client.open_trainer_endpoint = open_group
    vllm_client.packed_nccl_broadcast_producer = send
    # the client refuses a CPU, and takes a CUDA device without an index as it is, without looking for it
    vllm_client.VLLMClient.init_communicator = lambda self, device=0: init_communicator(self, "cuda")
