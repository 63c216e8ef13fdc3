import pytest
from fusedacl.kernels.support.names import check_name


def test_offers_the_nearest_name() -> None:
    check_name("impl", "tiled", ("reference", "tiled"))
    with pytest.raises(ValueError, match="impl is 'refrence'.*did you mean 'reference'"):
        check_name("impl", "refrence", ("reference", "tiled"))
    with pytest.raises(ValueError, match="impl is 'zzz': it must be one of reference, tiled$"):
        check_name("impl", "zzz", ("reference", "tiled"))
