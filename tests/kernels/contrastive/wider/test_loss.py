"""Every implementation of the wider losses against the reference, and the reference itself."""

from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, REDUCTIONS, combine, use_implementation
from fusedacl.kernels import acl_loss, supcon_loss
from fusedacl.kernels.contrastive.tiled import cpu_triangle
from fusedacl.kernels.contrastive.tiled import loss as tiled
from fusedacl.kernels.contrastive.wider import compiled, pairs
from torch.autograd import gradcheck
from wider_cases import LABELS, TEMPERATURES, check, loss_of, make_problem, results

KINDS: list[dict[str, Any]] = [
    {"label_embeddings": False},
    {},
    {"teacher": True},
    {"memory": 9},
    {"memory": 0, "class_weights": True},
    {"label_embeddings": False, "memory": 150, "mask": True},
    {"teacher": True, "memory": 9, "class_weights": True, "mask": True},
    {"exits": 3},
    {"exits": 2, "teacher": True, "memory": 5},
]


@pytest.fixture(params=["compiled loop", "compiled pairs", "tiles", "tiles of 4 rows"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` of what is meant."""
    if request.param != "compiled loop":
        monkeypatch.setattr(compiled, "takes", lambda wider: False)
    if request.param.startswith("compiled"):
        if not cpu_triangle.can_run(torch.empty(1, 1)):
            pytest.skip("the compiled loop was not built: no C compiler at installation")
        return "tiled"
    monkeypatch.setattr(pairs, "compiled_loop_takes", lambda found: False)
    if request.param == "tiles of 4 rows":
        monkeypatch.setattr(tiled, "TILE", 4)
    return "tiled"


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_error_is_that_of_the_reference(implementation: str, denominator: str) -> None:
    for labels, temperature, kind, reduction, positives, num_samples in combine(
        LABELS, TEMPERATURES, KINDS, REDUCTIONS, ("overlap", "each"), (1, 12, 150)
    ):
        if labels == "soft" and positives == "each":
            continue
        problem = make_problem(
            num_samples, labels, temperature, **kind,
            denominator=denominator, reduction=reduction, positives=positives,
        )  # fmt: skip
        check(problem, implementation)


def test_error_of_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a number as temperature; in the interpreter, on blocks of small tiles."""
    pytest.importorskip("triton")
    use_implementation(monkeypatch, "fused")
    for labels, kind, reduction, denominator, num_samples in combine(
        LABELS, KINDS, REDUCTIONS, DENOMINATORS, (1, 12, 40)
    ):
        if denominator == "negatives" and labels not in ("integers", "ignored"):
            continue
        problem = make_problem(num_samples, labels, **kind, denominator=denominator)
        check(problem | {"reduction": reduction}, "triton")


def test_fused_kernels_with_16_bits_and_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    use_implementation(monkeypatch, "fused")
    problem = make_problem(40, "several", memory=7, temperature=None)
    for name, value in problem.items():
        if name.endswith("embeddings"):
            problem[name] = value.half()
    exact = results({**problem, "temperature": 0.3}, "tiled")
    found = results(problem, "triton")
    for name, value in exact.items():
        torch.testing.assert_close(
            found[name], value, rtol=5e-3, atol=2e-3 * float(value.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_of_the_specification(kind: dict[str, Any], temperature: str | None) -> None:
    problem = make_problem(5, "several", temperature, **kind)
    for name, value in problem.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            problem[name] = value.double()
    names = [name for name in ("embeddings", "label_embeddings") if name in problem]
    names += [name for name in ("temperature", "label_temperature") if name in problem]
    names = [name for name in names if isinstance(problem[name], torch.Tensor)]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        arguments = problem | dict(zip(names, values, strict=True))
        return loss_of(problem)(**arguments, impl="reference")

    assert gradcheck(loss, [problem[name].requires_grad_() for name in names])


def test_the_formula_written_out() -> None:
    """With "each" a label of a row is an anchor, and the rows that share it are its positives."""
    x = torch.nn.functional.normalize(torch.randn(6, 3, dtype=torch.double))
    y = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]])
    s = (x @ x.T / 0.5).tolist()
    rows = range(6)
    log_sums = [torch.tensor(s[i], dtype=torch.double).logsumexp(0) for i in rows]
    overlap, each = [], []
    for i in rows:
        shared = {j: int((y[i] * y[j]).sum()) for j in rows if j != i}
        if sum(shared.values()):
            mean = sum(p * s[i][j] for j, p in shared.items()) / sum(shared.values())
            overlap.append(log_sums[i] - mean)
        for c in range(3):
            others = [j for j in rows if j != i and y[j, c]]
            if y[i, c] and others:
                each.append(log_sums[i] - sum(s[i][j] for j in others) / len(others))
    for positives, anchors in (("overlap", overlap), ("each", each)):
        for impl in ("reference", "tiled"):
            loss = supcon_loss(x, y.bool(), positives=positives, impl=impl)
            torch.testing.assert_close(loss, torch.stack(anchors).mean())


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("kind", KINDS[:7], ids=str)
def test_one_hot_rows_are_integers(impl: str, kind: dict[str, Any]) -> None:
    problem = make_problem(30, **kind)
    one_hot = dict(problem)
    for name in ("labels", "memory_labels"):
        if name in problem:
            one_hot[name] = torch.nn.functional.one_hot(problem[name], 4).float()
    torch.testing.assert_close(results(problem, impl), results(one_hot, impl))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_a_constant_tensor_is_a_number(impl: str) -> None:
    problem = make_problem(30)
    found = results(problem, impl)
    for temperature in (torch.tensor(0.3), torch.full((30,), 0.3)):
        wider = results(problem | {"temperature": temperature}, impl)
        wider.pop("temperature")
        torch.testing.assert_close(wider, found)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_a_memory_of_the_batch_itself_is_counted_twice(impl: str) -> None:
    """D of the doubled batch is that of rows and memory; the memory itself is no anchor."""
    x, labels = torch.randn(10, 4), torch.arange(10) % 3
    losses = supcon_loss(
        torch.cat([x, x]), labels.repeat(2), reduction="none", impl=impl, temperature=0.4
    )
    found = supcon_loss(
        x, labels, reduction="none", impl=impl, temperature=0.4,
        memory_embeddings=x, memory_labels=labels,
    )  # fmt: skip
    torch.testing.assert_close(found, losses[:10])


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_weights_of_classes_and_masks(impl: str) -> None:
    x, labels = torch.randn(12, 4), torch.arange(12) % 3
    losses = supcon_loss(x, labels, reduction="none", impl=impl)
    weights = torch.tensor([1.0, 0.0, 2.5])
    loss = supcon_loss(x, labels, class_weights=weights, impl=impl)
    of_rows = weights[labels]
    torch.testing.assert_close(loss, (losses * of_rows).sum() / of_rows.sum())

    mask = torch.arange(12) % 5 == 2
    x[mask] = torch.nan
    for rows in (labels, torch.nn.functional.one_hot(labels)):
        kept = supcon_loss(x[~mask], rows[~mask].bool() if rows.dim() == 2 else rows[~mask])
        masked = supcon_loss(
            x, rows.bool() if rows.dim() == 2 else rows, ignore_mask=mask, impl=impl
        )
        torch.testing.assert_close(masked, kept)


@pytest.mark.parametrize("labels", ["several", "integers"])
def test_nan_is_not_hidden(labels: str) -> None:
    problem = make_problem(30, labels)
    problem["embeddings"][3, 1] = torch.nan
    for impl in ("reference", "tiled"):
        found = results(problem | {"ignore_mask": torch.arange(30) == 7}, impl)
        assert found["loss"].isnan()
        assert found["embeddings"][3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_embeddings_and_autocast(dtype: torch.dtype) -> None:
    """Computed in float32 from rounded inputs; under autocast dtypes may differ."""
    problem = make_problem(40, "several", "by sample", memory=7)
    rounded = {
        name: value.to(dtype).float() if name.endswith("embeddings") else value
        for name, value in problem.items()
    }
    exact = results(rounded, "tiled")
    half = dict(rounded)
    half["embeddings"] = rounded["embeddings"].to(dtype)
    with pytest.raises(TypeError, match="convert one of them"):
        results(half, "tiled")
    with torch.autocast("cpu", torch.bfloat16):
        found = results(half, "tiled")
    torch.testing.assert_close(found["loss"], exact["loss"])
    gradients = found["embeddings"].float(), exact["embeddings"]
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-3)


def test_compiled_as_one_graph() -> None:
    problem = make_problem(20, "several", "by sample", memory=6, class_weights=True)
    x, weight = problem.pop("embeddings"), problem.pop("label_embeddings")
    temperature = problem.pop("temperature")

    def loss(x: torch.Tensor, weight: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return acl_loss(x, label_embeddings=weight, temperature=temperature, **problem)

    outcomes = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, temperature)]
        value = function(*inputs)
        outcomes.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operators() -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, 9, 4), dim=-1)
    arguments = (
        rows[:, :5].clone().requires_grad_(), rows, torch.tensor([2.0, 3.0]).requires_grad_(),
        torch.ones(9), torch.arange(9) % 3, "others", 7, 5, 2**20, None,
    )  # fmt: skip
    torch.library.opcheck(pairs.denominators_operator, arguments)


def test_kept_exponentials_and_those_computed_again_agree() -> None:
    """Also those of a second backward pass, whose tiles were given back."""
    x, labels = torch.randn(700, 8, requires_grad=True), torch.rand(700, 5) < 0.3
    gradients = []
    for pair_memory in (2**20, 2**26):
        loss = supcon_loss(x, labels, pair_memory=pair_memory)
        for _ in range(2):
            gradients += torch.autograd.grad(loss, x, retain_graph=True)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_bits_do_not_depend_on_threads() -> None:
    problem = make_problem(400, "several", "scalar")
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            found.append(results(problem, "tiled"))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        for name, ours in found[0].items():
            assert torch.equal(ours, others[name])


@pytest.mark.parametrize(
    "changes",
    [{"ignore_mask": torch.arange(12) == 2}, {"temperature": torch.tensor(0.4)}],
    ids=["mask", "temperature"],
)
def test_a_second_derivative_is_refused(changes: dict[str, Any]) -> None:
    x = torch.randn(12, 4, requires_grad=True)
    loss = supcon_loss(x, torch.arange(12) % 3, **changes)
    with pytest.raises(RuntimeError, match="create_graph=True: this loss has no second"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_narrow_integers_and_any_ignore_index(impl: str) -> None:
    x, labels = torch.randn(6, 4), torch.tensor([10, 10, 20, 20, 30, 30])
    mask = torch.zeros(6, dtype=torch.bool)
    wanted = supcon_loss(x, labels)
    for ignore_index in (-100, 1, 2):
        for dtype in (torch.uint8, torch.int8, torch.int64):
            found = supcon_loss(
                x, labels.to(dtype), ignore_mask=mask, ignore_index=ignore_index, impl=impl
            )
            torch.testing.assert_close(found, wanted)
    many = torch.randn(300, 4)
    plain = acl_loss(x, labels.to(torch.uint8), many)
    found = acl_loss(x, labels.to(torch.uint8), many, ignore_mask=mask, impl=impl)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_batches_without_rows(impl: str) -> None:
    for shape, temperature in (((0, 4), torch.tensor(0.3)), ((0, 4), torch.ones(0))):
        x = torch.randn(shape, requires_grad=True)
        loss = supcon_loss(x, torch.zeros(0, dtype=torch.long), temperature=temperature, impl=impl)
        loss.backward()
        assert loss == 0
    labels = torch.zeros(3, dtype=torch.long)
    none = supcon_loss(torch.randn(0, 3, 4), labels, temperature=torch.tensor(0.3), impl=impl)
    assert none.shape == (0,)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_a_masked_row_may_hold_anything(impl: str) -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    labels, mask = torch.tensor([0, 1, -1, 2, 0]), torch.arange(5) == 2
    wanted = acl_loss(x[~mask], labels[~mask], weight)
    torch.testing.assert_close(acl_loss(x, labels, weight, ignore_mask=mask, impl=impl), wanted)
    several = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
    several[2] = torch.nan
    torch.testing.assert_close(acl_loss(x, several, weight, ignore_mask=mask, impl=impl), wanted)


def test_tiny_memberships_are_common_labels() -> None:
    """Their product is 0 in float32."""
    labels = torch.tensor([[1, 0, 1e-25], [0, 1, 1e-25], [1, 0, 0], [0, 1, 0]])
    x = torch.randn(4, 3)
    found, wanted = (
        supcon_loss(x, labels, denominator="negatives", impl=impl)
        for impl in ("tiled", "reference")
    )
    torch.testing.assert_close(found, wanted)


def test_compiled_graphs_check_temperatures_and_labels() -> None:
    x, labels, weight = torch.randn(6, 4), torch.arange(6) % 3, torch.randn(3, 4)
    compiled = torch.compile(acl_loss, backend="aot_eager")
    for temperature in (0.01, -0.5):
        with pytest.raises(ValueError, match=r"temperature has a value outside \[1 / 70, inf\)"):
            compiled(x, labels, weight, temperature=torch.tensor(temperature))
    with pytest.raises(IndexError):
        compiled(x, labels + 1, weight, temperature=torch.tensor(0.3))


def test_compiled_with_dynamic_shapes() -> None:
    problem = make_problem(20, temperature="scalar", teacher=True, memory=6)
    compiled = torch.compile(loss_of(problem), backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(**problem), loss_of(problem)(**problem))
