"""Bad arguments of a ranking are named, with the remedy."""

import math

import pytest

from dualpipe_jax import Costs, Remat, StageMemory, rank_schedules
from tests.planning.rankings import NOTHING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, r"limit=0 must be a finite number > 0; give a device's bytes"),
        ({"limit": math.inf}, r"limit=inf must be a finite number > 0"),
        ({"limit": "80"}, r"limit='80' must be a finite number > 0"),
        ({"num_ranks": 0}, r"num_ranks=0 must be at least 1"),
        ({"num_microbatches": 0}, r"num_microbatches=0 must be at least 1"),
        ({"num_microbatches": []}, r"num_microbatches=\[\] must be a number of micro"),
        ({"num_microbatches": "16"}, r"num_microbatches='16' must be a number of"),
        ({"num_microbatches": [8.5]}, r"num_microbatches=8.5 must be an integer"),
        ({"measured_at": 0}, r"measured_at=0 must be at least 1"),
        ({"costs": None}, r"costs=None must be a Costs"),
        ({"costs": {"F": 1}}, r"costs=\{'F': 1\} must be a Costs"),
        ({"costs": Costs(F=0)}, r"costs.F=0.0 must be a finite number > 0"),
        ({"memory": 3}, r"memory=3 must be a StageMemory"),
        ({"remat": ["full"]}, r"remat='full' must be a Remat"),
        ({"remat": 3}, r"remat=3 must be a Remat"),
        ({"remat": [Remat("a", 1, 1)] * 2}, r"remat has \['a'\] twice"),
        ({"schedules": ["1f1b", "zb2p"]}, r"names 'zb2p', which is unknown; use some"),
        ({"schedules": []}, r"schedules=\[\] names none"),
        ({"task_overhead": -1}, r"task_overhead=-1 must be a finite number >= 0"),
        ({"update_time": math.nan}, r"update_time=nan must be a finite"),
        ({"exchange_time": None}, r"exchange_time=None must be a finite"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(changes, message):
    arguments = {
        "num_ranks": 4,
        "num_microbatches": 8,
        "costs": Costs(),
        "memory": NOTHING,
        "limit": 1,
    }
    with pytest.raises(ValueError, match=message):
        rank_schedules(**(arguments | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StageMemory(-1, 0, 0, 0),
            r"residuals=-1 must be a finite number >= 0",
        ),
        (
            lambda: StageMemory(0, None, 0, 0),
            r"wgrad_residuals=None must be a finite number",
        ),
        (lambda: StageMemory(0, 0, 0, 0, at_rest=-2), r"at_rest=-2 must be a finite"),
        (lambda: Remat("full", math.nan, 0), r"residuals=nan must be a finite number"),
        (lambda: Remat("full", 0, 0, cost=-1), r"cost=-1 must be .* unit of costs"),
        (lambda: Remat("none", 0, 0), r"name='none' must be a word other than 'none'"),
        (lambda: Remat("", 0, 0), r"name='' must be a word"),
        (lambda: Costs(F=-1), r"F=-1 must be a finite number"),
    ],
)
def test_bad_fields_are_named_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
