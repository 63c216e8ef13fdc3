import pytest
import torch
from fusedacl.kernels.contrastive.batch import compute_classes, row_classes


def test_classes_of_labels_and_label_embeddings() -> None:
    classes, may_ignore = compute_classes(torch.tensor([2, 0, 2]), 3, -100, 2)
    assert classes.tolist() == [2, 0, 2, 0, 1, 2] * 2
    assert not may_ignore


def test_ignored_samples_get_the_id_after_the_last_class() -> None:
    labels = torch.tensor([2, -100, 0])
    classes, may_ignore = compute_classes(labels, 3, -100, 1)
    assert classes.tolist() == [2, 3, 0, 0, 1, 2]
    assert may_ignore
    assert labels.tolist() == [2, -100, 0]


def test_any_integers_become_ids_below_their_number() -> None:
    labels = torch.tensor([70, -3, 70, 10**15, -100])
    classes, may_ignore = compute_classes(labels, None, -100, 1)
    assert may_ignore
    assert classes[0] == classes[2] != classes[1]
    assert classes[4] == 5
    assert classes[:4].unique().numel() == 3
    assert (classes[:4] < 5).all()


def test_operator_passes_opcheck() -> None:
    torch.library.opcheck(row_classes, (torch.tensor([1, -100, 0]), 2, -100, 2))
    torch.library.opcheck(row_classes, (torch.tensor([1, -100, 0]), None, -100, 1))


def test_first_label_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"labels holds 9, .*K = 3 .*\[0, 3\)"):
        compute_classes(torch.tensor([0, 9, -5, -100]), 3, -100, 1)
