"""Several processes that work on one problem, through torch.distributed."""

from hesscope.parallel.data_parallel import data_parallel, divided
from hesscope.parallel.launch import launched
from hesscope.parallel.sharding import fully_shard_model, mesh_of, shard_model

__all__ = ["data_parallel", "divided", "fully_shard_model", "launched", "mesh_of", "shard_model"]
