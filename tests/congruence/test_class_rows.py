import pytest
import torch
from torch import nn

from lqf_lightning.congruence.class_rows import align_classes
from lqf_lightning.congruence.interpolation import interpolate

OLD, NEW = ["cat", "dog", "emu"], ["dog", "fox", "cat", "gnu"]


def net(classes, convolution=False):
    last = nn.Conv2d(4, classes, 1) if convolution else nn.Linear(4, classes)
    body = nn.Sequential(nn.Conv2d(3, 4, 1), *([] if convolution else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]))
    return nn.Sequential(body, last)


@pytest.mark.parametrize("convolution", [False, True])
def test_old_rows_answer_to_their_names(convolution):
    torch.manual_seed(0)
    old, new = net(3, convolution), net(4, convolution)
    aligned = align_classes(old.state_dict(), new.state_dict(), "1", OLD, NEW)
    x = torch.randn(5, 3, 6, 6)
    before, unknown = old(x), new[1](old[0](x))  # rows of new classes on the old features
    after = net(4, convolution)
    after.load_state_dict(aligned)
    for position, name in enumerate(NEW):
        expected = before[:, OLD.index(name)] if name in OLD else unknown[:, position]
        assert torch.allclose(after(x)[:, position], expected, rtol=1e-6, atol=1e-6)


def test_the_same_classes_change_nothing_and_share_no_memory():
    state = net(3).state_dict()
    aligned = align_classes(state, net(3).state_dict(), "1", OLD, OLD)
    for name, entry in state.items():
        assert torch.equal(aligned[name], entry)
        assert aligned[name].data_ptr() != entry.data_ptr()


def test_rows_that_only_the_new_model_has_stay_through_any_average():
    torch.manual_seed(0)
    old, new = net(3).state_dict(), net(4).state_dict()
    aligned = align_classes(old, new, "1", OLD, NEW)
    for share in (0, 0.3, 0.9, 1):
        got = interpolate(aligned, new, share)
        assert torch.equal(got["1.weight"][[1, 3]], new["1.weight"][[1, 3]])
    assert torch.equal(got["1.weight"][[2, 0]], old["1.weight"][:2])


def test_a_network_that_is_its_own_head():
    old, new = nn.Linear(2, 3).state_dict(), nn.Linear(2, 4).state_dict()
    aligned = align_classes(old, new, "", OLD, NEW)
    assert torch.equal(aligned["bias"][2], old["bias"][0])


def test_other_parts_are_left_alone_even_if_they_have_as_many_rows():
    old, new = {"a": torch.zeros(3), "1.bias": torch.ones(3)}, {"a": torch.ones(3), "1.bias": torch.ones(4)}
    assert torch.equal(align_classes(old, new, "1", OLD, NEW)["a"], old["a"])


def test_heads_that_do_not_fit_are_refused():
    old, new = net(3).state_dict(), net(4).state_dict()
    with pytest.raises(ValueError, match=r"no final layer 'fc'; its entries end in .*1.weight"):
        align_classes(old, new, "fc", OLD, NEW)
    with pytest.raises(ValueError, match="no final layer ''"):
        align_classes(old, new, "", OLD, NEW)
    with pytest.raises(ValueError, match=r"1.weight of the old model is \(3, 4\), expected \(2, 4\)"):
        align_classes(old, new, "1", OLD[:2], NEW)
    with pytest.raises(ValueError, match=r"1.weight of the new model is \(4, 4\), expected \(3, 4\)"):
        align_classes(old, new, "1", OLD, NEW[:3])
    with pytest.raises(ValueError, match=r"1.weight of the old model is missing"):
        align_classes({}, new, "1", OLD, NEW)
    with pytest.raises(ValueError, match=r"share no name"):
        align_classes(old, new, "1", ["a", "b", "c"], NEW)
