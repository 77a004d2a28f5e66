"""Images that are arrays: read box by box, each pixel once per pass, with the results of the tensor."""

import numpy as np
import pytest
import torch
from compare import integer_image, make_integer
from counted import Counted
from torch import nn

import fxstream
from fxstream.runtime.reading import prefetch as reading


class Normalising(nn.Module):
    """Takes bytes: normalisation belongs to the model."""

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, image):
        return self.last(self.first(image.to(self.first.weight.dtype) - 4).relu())


def bytes_image(*shape):
    return np.random.default_rng(0).integers(0, 9, shape, dtype=np.uint8)


def gradients(module, model, image):
    model.zero_grad()
    output = module(image)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


def test_bytes_from_an_array_give_what_the_tensor_gives():
    model = make_integer(Normalising())
    array = Counted(bytes_image(43, 58, 3))
    image = torch.from_numpy(array.array).permute(2, 0, 1)[None]
    module = fxstream.compile(model, tile=21, segments=1)
    found = gradients(module, model, fxstream.source(array, layout="HWC"))
    for mine, wanted in zip(found, gradients(model, model, image), strict=True):
        assert torch.equal(mine, wanted)
    assert (array.counts == 2).all()  # once in forward, once in backward
    assert array.largest <= 21 * 21 * 3


def test_overlaps_are_read_again_where_they_may_not_be_held(monkeypatch):
    monkeypatch.setattr(reading, "MOST_HELD", 60)
    model = make_integer(Normalising())
    array = Counted(bytes_image(43, 58, 3))
    with torch.no_grad():
        found = fxstream.compile(model, tile=21, segments=1, verify=False)(fxstream.source(array, layout="HWC"))
        assert torch.equal(found, model(torch.from_numpy(array.array).permute(2, 0, 1)[None]))
    assert array.counts.min() == 1
    assert array.counts.max() > 1


@pytest.mark.parametrize(
    "layout, shape", [("HWC", (25, 31, 2)), ("CHW", (2, 25, 31)), ("NHWC", (2, 25, 31, 2)), ("YX", (25, 31))]
)
@pytest.mark.parametrize("dtype", ["uint8", ">i2", "float32", "float64"])
def test_layouts_and_types(layout, shape, dtype):
    array = bytes_image(*shape).astype(dtype)
    order = [layout.index(axis) for axis in ("N", "C", *(a for a in layout if a not in "NC")) if axis in layout]
    native = np.ascontiguousarray(array.transpose(order)).astype(array.dtype.newbyteorder("="))
    image = torch.from_numpy(native)
    for dim, axis in enumerate("NC"):
        image = image if axis in layout else image.unsqueeze(dim)
    model = make_integer(Normalising(image.shape[1]))
    with torch.no_grad():
        module = fxstream.compile(model, tile=11, segments=1, verify=False)
        assert torch.equal(module(fxstream.source(array, layout=layout)), model(image))


def test_batches():
    model = make_integer(Normalising())
    stack = bytes_image(5, 25, 31, 3)
    image = torch.from_numpy(stack).permute(0, 3, 1, 2)
    module = fxstream.compile(model, tile=11, segments=1, verify=False)
    with torch.no_grad():
        picked = module(fxstream.source(stack, layout="NHWC", batch=[4, 1]))
        assert torch.equal(picked, model(image[[4, 1]]))
        assert torch.equal(module(fxstream.source(stack[0], stack[3], layout="HWC")), model(image[[0, 3]]))
        assert torch.equal(module(np.ascontiguousarray(image.numpy())), model(image))  # an array as it is
        halves = fxstream.source(stack[:2], stack[2:4], layout="NHWC")
        assert torch.equal(module(halves), model(image[:4]))


def test_type_on_the_device():
    model = make_integer(nn.Sequential(nn.Conv2d(3, 2, 3)))
    array = bytes_image(25, 31, 3)
    image = torch.from_numpy(array).permute(2, 0, 1)[None].double()
    with torch.no_grad():
        found = fxstream.compile(model, tile=11, segments=1, verify=False)(
            fxstream.source(array, layout="HWC", dtype=torch.float64)
        )
    assert torch.equal(found, model(image))


@pytest.mark.parametrize("kind", ["memmap", "zarr", "h5py", "tifffile"])
def test_stores(tmp_path, kind):
    array, store = bytes_image(70, 50, 3), None
    if kind == "memmap":
        stored = np.memmap(tmp_path / "image", mode="w+", shape=array.shape, dtype=array.dtype)
        stored[:] = array
        stored = np.memmap(tmp_path / "image", mode="r", shape=array.shape, dtype=array.dtype)
    elif kind == "zarr":
        stored = pytest.importorskip("zarr").create_array(str(tmp_path / "z"), data=array, chunks=(16, 16, 3))
    elif kind == "h5py":
        store = pytest.importorskip("h5py").File(tmp_path / "image.h5", "w")
        stored = store.create_dataset("image", data=array, chunks=(16, 16, 3))
    else:
        tifffile, zarr = pytest.importorskip("tifffile"), pytest.importorskip("zarr")
        tifffile.imwrite(tmp_path / "image.tif", array, tile=(16, 16))
        store = tifffile.imread(tmp_path / "image.tif", aszarr=True)
        stored = zarr.open(store, mode="r")
    model = make_integer(Normalising())
    with torch.no_grad():
        found = fxstream.compile(model, tile=23, segments=1, verify=False)(fxstream.source(stored, layout="HWC"))
    assert torch.equal(found, model(torch.from_numpy(array).permute(2, 0, 1)[None]))
    if store is not None:
        store.close()


def test_a_volume():
    model = make_integer(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 1, 3)))
    volume = bytes_image(14, 17, 12)
    with torch.no_grad():
        source = fxstream.source(volume, layout="ZYX", dtype=torch.float64)
        found = fxstream.compile(model, tile=9, segments=1, verify=False)(source)
        assert torch.equal(found, model(torch.from_numpy(volume)[None, None].double()))


@pytest.mark.filterwarnings("ignore:.*of the activations of Both are streamed:fxstream.StreamingWarning")
def test_what_is_not_streamed_gets_it_whole():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, image):
            return self.conv(image), image.flatten(2).sort().values[..., 3]

    model = make_integer(Both())
    array = bytes_image(25, 31).astype("float64")
    module = fxstream.compile(model, tile=11, segments=1)
    with torch.no_grad():
        for found, wanted in zip(
            module(fxstream.source(array, layout="HW")), model(torch.from_numpy(array)[None, None]), strict=True
        ):
            assert torch.equal(found, wanted)
    assert not module.plan.is_trivial


def test_an_image_outside_counts_where_it_is_read_whole():
    model = make_integer(Normalising())
    array = bytes_image(200, 200, 3)
    with torch.no_grad():
        module = fxstream.compile(model, memory="300KiB", verify=False)
        module(fxstream.source(array, layout="HWC"))
        streamed = module.plan.prediction
        module(integer_image(1, 3, 200, 200, requires_grad=False).to(torch.uint8))
        inside = module.plan.prediction
    assert streamed.plain_bytes == inside.plain_bytes + array.size


def failing_after(array, reads):
    class Failing(Counted):
        def __getitem__(self, index):
            if self.reads == reads:
                raise OSError("disk on fire")
            return super().__getitem__(index)

    return Failing(array)


class Shrinking(Counted):
    def __getitem__(self, index):
        return super().__getitem__(index)[: (5 if self.reads > 3 else 99)]


def test_errors_name_region_and_source():
    model = make_integer(Normalising())
    module = fxstream.compile(model, tile=21, segments=1, verify=False)
    broken = failing_after(bytes_image(43, 58, 3), 3)
    with (
        torch.no_grad(),
        pytest.raises(fxstream.StreamError, match=r"reading \[\d+:\d+, \d+:\d+, 0:3\] of .*Failing"),
    ):
        module(fxstream.source(broken, layout="HWC"))
    with torch.no_grad(), pytest.raises(fxstream.StreamError, match="disk on fire"):
        module(fxstream.source(failing_after(bytes_image(43, 58, 3), 0), layout="HWC"))
    with torch.no_grad(), pytest.raises(fxstream.StreamError, match=r"gave the shape .* has the array shrunk"):
        module(fxstream.source(Shrinking(bytes_image(43, 58, 3)), layout="HWC"))
    with torch.no_grad():  # usable afterwards
        module(fxstream.source(bytes_image(43, 58, 3), layout="HWC"))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"layout": "HWX"}, None),
        ({"layout": "HW"}, "does not fit an array of shape"),
        ({"layout": "HWW"}, "does not fit"),
        ({"layout": "NCH", "batch": [25]}, "outside of 25 entries"),
        ({"layout": "HWC", "batch": [0]}, "picks entries along N"),
    ],
)
def test_bad_layouts(arguments, match):
    if match is None:
        assert fxstream.source(bytes_image(25, 31, 3), **arguments).shape == (1, 1, 25, 31, 3)
        return
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.source(bytes_image(25, 31, 3), **arguments)


def test_bad_arrays():
    with pytest.raises(fxstream.InputError, match="needs shape, dtype and slicing; found str"):
        fxstream.source("slide.tif", layout="HWC")
    with pytest.raises(fxstream.InputError, match="complex"):
        fxstream.source(np.zeros((4, 4), complex), layout="HW")
    with pytest.raises(fxstream.InputError, match="torch has no such type"):
        fxstream.source(np.zeros((4, 4), "U3"), layout="HW")
    with pytest.raises(fxstream.InputError, match="one shape and type"):
        fxstream.source(np.zeros((4, 4)), np.zeros((4, 5)), layout="HW")


class Plain:
    """An array of another package: shape, type, slices, and nothing else."""

    def __init__(self, array, dtype=None):
        self.array, self.shape, self.dtype = array, array.shape, np.dtype(dtype or array.dtype)

    def __getitem__(self, index):
        return self.array[index]


class Raising(Plain):
    """An array that raises something else than AttributeError for what it has not, as netCDF4's variables do."""

    def __getattr__(self, name):
        raise KeyError(name)


def test_an_array_whose_attributes_raise():
    model = make_integer(Normalising(1))
    array = Raising(bytes_image(43, 58))
    with torch.no_grad():
        found = fxstream.compile(model, tile=21, segments=1, verify=False)(fxstream.source(array, layout="YX"))
    assert torch.equal(found, model(torch.from_numpy(array.array)[None, None]))
    assert repr(fxstream.source(array, layout="YX")) == (
        "Source(test_source.Raising [43, 58], [1, 1, 43, 58], torch.uint8)"
    )


def test_slices_of_another_type_than_the_array_declares():
    """As of NIfTI's `dataobj` and of scaled netCDF variables: integers on disk, floats when they are read."""
    model = make_integer(nn.Conv2d(1, 2, 3))
    array = Plain(bytes_image(43, 58) / 2, "int16")
    module = fxstream.compile(model, tile=21, segments=1, verify=False)
    message = r"gave torch.float64, and the array says that it is int16: choose the type, as .*dtype=torch.float64"
    with torch.no_grad(), pytest.raises(fxstream.StreamError, match=message):
        fxstream.source(array, layout="HW")[()]
    with torch.no_grad():
        found = module(fxstream.source(array, layout="HW", dtype=torch.float64))
    assert torch.equal(found, model(torch.from_numpy(array.array)[None, None]))


def test_masks_are_dropped_with_a_warning():
    values = bytes_image(43, 58)
    masked = Plain(np.ma.masked_equal(values, 3))
    with pytest.warns(
        fxstream.StreamingWarning, match=r"Plain \[43, 58\] has masked values, whose mask is dropped"
    ):
        assert torch.equal(fxstream.source(masked, layout="HW")[()][0, 0], torch.from_numpy(values))
    unmasked = Plain(np.ma.masked_equal(values, 77))
    assert torch.equal(fxstream.source(unmasked, layout="HW")[()][0, 0], torch.from_numpy(values))


class PixelLoss(nn.Module):
    """Labels [N, spatial dims...] and weights beside the image."""

    def __init__(self, convolution):
        super().__init__()
        self.conv = convolution

    def forward(self, image, labels, weights):
        return (nn.functional.cross_entropy(self.conv(image), labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("shape", [(2, 33, 40), (2, 14, 15, 16)])
def test_labels_and_weights_from_arrays(shape):
    """They have the image's pixels and no channels."""
    convolution = nn.Conv2d if len(shape) == 3 else nn.Conv3d
    torch.manual_seed(0)
    model = PixelLoss(convolution(3, 4, 3, padding=1)).double()
    image = torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)
    labels, weights = (
        Counted(bytes_image(*shape).astype("int64") % 4),
        Plain(bytes_image(*shape).astype("float64")),
    )
    module = fxstream.compile(model, tile=9, segments=1)
    found = gradients(lambda arrays: module(image, *arrays), model, (labels, weights))
    tensors = torch.from_numpy(labels.array), torch.from_numpy(weights.array)
    expected = gradients(lambda tensors: model(image, *tensors), model, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert module.plan.segments[0].tile_count > 4
    assert labels.largest < labels.array.size


@pytest.mark.parametrize(
    "shape, layout, match",
    [
        ((600, 600, 3), "hwc", "is not in upper case: give 'HWC'"),
        ((600, 600, 3), "HwC", "is not in upper case: give 'HWC'"),
        ((600, 600, 3), "CHW", r"image of 600 channels that has 3 pixels along W: is it 'HWC'\?"),
        ((2, 150, 600, 3), "NCHW", r"is it 'NHWC'\?"),
        ((2, 3, 150, 600), "NHWC", r"is it 'NCHW'\?"),
        ((40, 50, 60, 4), "CZYX", r"is it 'ZYXC'\?"),
        ((3, 600, 600), "CHW", None),
        ((4, 600, 600, 32), "ZYXC", None),
        ((200, 60, 60), "CHW", None),
        ((32, 3, 60, 60), "CZYX", None),
        ((5, 16, 3), "CHW", None),
        ((2, 64, 3), "NCL", None),
    ],
)
def test_layouts_that_cannot_be_right(shape, layout, match):
    array = np.broadcast_to(np.uint8(0), shape)
    if match is None:
        assert fxstream.source(array, layout=layout).shape.numel() == array.size
        return
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.source(array, layout=layout)


@pytest.mark.parametrize("batch", [2, [1.5], "1"])
def test_a_batch_is_a_list_of_entries(batch):
    with pytest.raises(fxstream.InputError, match=r"is no list of entries along N: give one, as batch=\[2\]"):
        fxstream.source(bytes_image(5, 3, 9, 9), batch=batch)


@pytest.mark.parametrize("differentiated", [True, False])
def test_bytes_into_a_network_of_floats(differentiated):
    module = fxstream.compile(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), tile=21)
    image = fxstream.source(bytes_image(43, 58, 3), layout="HWC")
    message = r"an input is uint8 and weights are float32: convert it.*source\(\.\.\., dtype=torch.float32\)"
    with torch.set_grad_enabled(differentiated), pytest.raises(fxstream.CaptureError, match=message):
        module(image)
