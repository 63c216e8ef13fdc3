import pytest
import torch
from fusedacl.kernels import dispatch, reference, supcon_loss, supcon_tiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_auto_is_tiled_wherever_it_can_run(dtype: torch.dtype) -> None:
    assert dispatch.choose("auto", dtype, 0.5) == "tiled"
    assert dispatch.choose("auto", dtype, 1 / 689) == "tiled"
    assert dispatch.choose("auto", dtype, 1 / 691) == "reference"


def test_the_choice_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module in (reference, supcon_tiled):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(
            module, "contrastive_loss", lambda *_, name=name: called.append(name) or torch.zeros(())
        )
    for impl, temperature in (("auto", 0.5), ("auto", 1e-3), ("reference", 0.5), ("tiled", 0.5)):
        supcon_loss(torch.randn(4, 3), torch.zeros(4).long(), impl=impl, temperature=temperature)
    assert called == ["supcon_tiled", "reference", "reference", "supcon_tiled"]


def test_explains_in_words() -> None:
    text = dispatch.explain("cpu", torch.bfloat16)
    assert "cpu" in text
    assert "torch.bfloat16 embeddings: tiled (the fastest" in text
    assert "computed in torch.float32" in text
    assert "no Triton kernels" in text
    assert "computed in torch.float64" in dispatch.explain("cpu", temperature=0.01)
    text = dispatch.explain("cpu", temperature=0.001)
    assert "reference (tiled cannot run: temperature 0.001 is below 1 / 690" in text
