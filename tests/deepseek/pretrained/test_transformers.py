"""What transformers makes of a folder that was exported: needs torch and transformers.

Neither is installed for the other tests: pip install 'dualpipe-jax[torch]'.
"""

import numpy as np
import pytest

from dualpipe_jax.deepseek import load_pretrained
from dualpipe_jax.deepseek.pretrained.saving import save_folder
from dualpipe_jax.deepseek.pretrained.target import Target
from tests.deepseek.pretrained.folders import V2, V3

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.mark.parametrize("folder", [V2, V3], ids=lambda folder: folder.name)
def test_transformers_computes_the_same_logits(folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    ours = load_pretrained(folder)
    # float32, so that nothing is rounded on the way.
    target = Target(ours.config, "float32", 64, fp8=False)
    state = ours.model, ours.params, ours.buffers
    save_folder(tmp_path / "out", target, *state, 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 24))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    error = np.abs(np.asarray(ours.logits(tokens)) - wanted).max()
    assert error <= 2e-5 * np.abs(wanted).max()
