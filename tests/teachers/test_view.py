import torch
from torchvision.transforms import v2

from lqf_lightning.teachers import View

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalized(pixels, mean, std):
    return (pixels - torch.tensor(mean, dtype=pixels.dtype).view(3, 1, 1)) / torch.tensor(std, dtype=pixels.dtype).view(
        3, 1, 1
    )


def test_images_of_another_network_become_what_the_view_would_have_made_of_the_pixels():
    pixels = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    view = View(8, 1.0, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    seen = view.translate(normalized(pixels, *IMAGENET), *IMAGENET)
    torch.testing.assert_close(seen, normalized(pixels, view.mean, view.std), rtol=1e-13, atol=1e-13)


def test_images_of_the_view_itself_are_returned_as_they_are():
    images = torch.randn(2, 3, 8, 8)
    view = View(8, 0.9, *IMAGENET)
    assert view.translate(images) is images
    assert view.translate(images, list(IMAGENET[0]), list(IMAGENET[1])) is images


def test_other_sizes_are_resized_with_antialiasing():
    images = torch.rand(2, 3, 12, 12)
    view = View(6, 1.0, *IMAGENET)
    expected = v2.functional.resize(images, [6, 6], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(view.translate(images), expected)


def test_a_batch_without_rows_passes():
    assert len(View(6, 1.0, *IMAGENET).translate(torch.zeros(0, 3, 12, 12), (0, 0, 0), (1, 1, 1))) == 0
