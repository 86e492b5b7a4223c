import pytest
import timm
import torch
import torchvision

from lqf_lightning.backbones.strides import move_strides_to_1x1


@pytest.mark.parametrize("build", [torchvision.models.resnet50, lambda: timm.create_model("resnet50")])
def test_a_moved_stride_drops_pixels_before_the_block(build) -> None:  # type: ignore[no-untyped-def]
    model = build().double().eval()
    assert move_strides_to_1x1(model) == 3
    block = model.layer2[0]
    x = torch.randn(1, 256, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        moved = block(x)
        for layer in (block.conv1, block.conv2, block.downsample[0]):
            layer.stride = (1, 1)
        torch.testing.assert_close(moved, block(x[:, :, ::2, ::2]), rtol=0, atol=1e-12)


def test_a_network_without_bottlenecks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.stride_in_1x1=true.*Set backbone\.stride_in_1x1=false"):
        move_strides_to_1x1(torchvision.models.resnet18())
