import torch
from fusedacl.kernels.contrastive.batch import compute_classes, row_classes


def test_operator_passes_opcheck() -> None:
    torch.library.opcheck(row_classes, (torch.tensor([1, -100, 0]), 2, -100, 2))
    torch.library.opcheck(row_classes, (torch.tensor([1, -100, 0]), None, -100, 1))


def test_whether_labels_may_be_ignored_is_known_on_the_cpu() -> None:
    for labels, ignored in (([2, 0, 2], False), ([2, -100, 0], True)):
        assert compute_classes(torch.tensor(labels), 3, -100, 2)[1] == ignored
