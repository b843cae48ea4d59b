"""Costs and bytes that several tests of rankings use."""

from dualpipe_jax import Costs, StageMemory

GIB = 2**30
# One or two stages a rank, without interleaving.
ALL = ["1f1b", "dualpipe", "dualpipev", "gpipe", "zb1p"]
# Of DeepSeek's published trace: F and I alone have their all-to-alls exposed.
DEEPSEEK = Costs(F=97, I=104, W=35, FB=129, p2p=1.2)
NOTHING = StageMemory(0, 0, 0, 0)
