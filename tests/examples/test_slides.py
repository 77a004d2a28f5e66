"""The slide example: what it reads from pyramids, what it does to images, what it trains and how it resumes."""

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from compare import assert_streams
from scipy.stats import rankdata

FOLDER = Path(__file__).parents[2] / "examples" / "slides"


def load() -> SimpleNamespace:
    """The modules of the example, which are scripts beside each other; other examples may use the same names."""
    names = [path.stem for path in FOLDER.glob("*.py") if path.stem != "small"]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.update({name: module for name, module in before.items() if module is not None})
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)


slides = load()


@pytest.fixture
def gradient():
    rows, columns = np.mgrid[:300, :420]
    return np.stack([rows // 2, columns // 2, (rows + columns) // 4], 2).astype(np.uint8)


@pytest.fixture
def pyramid(tmp_path, gradient):
    slides.make_slides.write_pyramid(tmp_path / "slide.tif", gradient, 0.5, levels=3)
    return slides.pyramid.open_slide(tmp_path / "slide.tif")


def test_a_pyramid_has_its_spacings(pyramid):
    assert pyramid.spacings == pytest.approx((0.5, 1.0, 2.0))
    assert pyramid.shapes == ((300, 420), (150, 210), (75, 105))


@pytest.mark.parametrize("wanted, level", [(0.5, 0), (0.9, 0), (1.0, 1), (1.9, 1), (2.0, 2), (16.0, 2)])
def test_the_level_is_the_nearest_at_or_below_the_spacing(pyramid, wanted, level):
    assert pyramid.level(wanted) == level


def test_a_spacing_finer_than_the_slide_is_an_error(pyramid):
    with pytest.raises(ValueError, match=r"finest level has 0\.5 µm per pixel, 0\.25 wanted"):
        pyramid.read(0.25)


def test_pixels_at_a_level_are_the_levels_and_others_are_resampled(pyramid, gradient):
    assert torch.equal(pyramid.read(0.5), torch.from_numpy(gradient).permute(2, 0, 1))
    assert pyramid.read(1.5).shape == (3, 100, 140)
    wanted = torch.from_numpy(gradient).permute(2, 0, 1)[:, 1::3, 1::3]
    assert (pyramid.read(1.5).int() - wanted.int()).abs().max() <= 2


@pytest.mark.parametrize("how", [{"tile": (64, 128)}, {"rowsperstrip": 37}], ids=["tiles", "strips"])
def test_a_box_is_the_same_part_of_the_whole(tmp_path, gradient, how):
    path = tmp_path / "flat.tif"
    tifffile.imwrite(path, gradient, photometric="rgb", resolution=(25400, 25400), resolutionunit="INCH", **how)
    slide = slides.pyramid.open_slide(path)
    assert slide.spacings == pytest.approx((1.0,))
    assert np.array_equal(slide.read_level(0, (0.25, 0.1, 0.75, 0.9)), gradient[75:225, 42:378])


def test_spacing_of_ome_and_aperio_files(tmp_path, gradient):
    metadata = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", gradient, photometric="rgb", metadata=metadata)
    assert slides.pyramid.open_slide(tmp_path / "a.ome.tif").spacings == pytest.approx((0.25,))
    aperio = "Aperio Image Library v10.0.51\r\n300x420 [0,0 420x300] (64x64) |AppMag = 40|MPP = 0.2520"
    tifffile.imwrite(
        tmp_path / "a.svs", gradient, photometric="rgb", tile=(64, 64), description=aperio, metadata=None
    )
    assert slides.pyramid.open_slide(tmp_path / "a.svs").spacings == pytest.approx((0.252,))


def test_a_slide_without_spacing_is_an_error(tmp_path, gradient):
    tifffile.imwrite(tmp_path / "a.tif", gradient, photometric="rgb")
    with pytest.raises(ValueError, match="pixel spacing"):
        slides.pyramid.open_slide(tmp_path / "a.tif")


def test_the_background_is_cropped(tmp_path):
    image = np.full((400, 600, 3), 245, np.uint8)
    image[100:300, 200:500] = (170, 90, 160)
    slides.make_slides.write_pyramid(tmp_path / "slide.tif", image, 1.0)
    slide = slides.pyramid.open_slide(tmp_path / "slide.tif")
    assert slides.data.tissue_box(slide) == pytest.approx((0.25, 1 / 3, 0.75, 5 / 6))
    tissue = slides.data.read_tissue(slide.path, 2.0)
    assert tissue.shape == (3, 100, 150)
    assert tissue.flatten(1).unique(dim=1).flatten().tolist() == [170, 90, 160]


def test_a_blank_slide_is_kept_whole(tmp_path):
    slides.make_slides.write_pyramid(tmp_path / "blank.tif", np.full((64, 64, 3), 240, np.uint8), 1.0, levels=1)
    assert slides.data.tissue_box(slides.pyramid.open_slide(tmp_path / "blank.tif")) == (0, 0, 1, 1)


def test_images_are_cropped_at_random_or_padded():
    image = torch.arange(1, 3 * 10 * 4 + 1).reshape(3, 10, 4)
    fitted = slides.data.fit(image, 7)
    assert fitted.shape == (3, 7, 7)
    windows = [image[:, first : first + 7] for first in range(4)]
    assert any(torch.equal(fitted[..., 1:5], window) for window in windows)
    assert fitted[..., [0, 5, 6]].count_nonzero() == 0
    rows = {int(slides.data.fit(image, 7)[0, 0, 1]) for _ in range(60)}
    assert rows == {1, 5, 9, 13}


def test_augmentations_keep_the_shape_and_are_seeded():
    image, augment = torch.rand(3, 60, 80), slides.augment.augmentations()
    seeds = (3, 3, 4)
    results = []
    for seed in seeds:
        torch.manual_seed(seed)
        results.append(augment(image))
    assert all(result.shape == image.shape and result.min() >= 0 and result.max() <= 1 for result in results)
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().mean() > 0.05


def test_a_deformation_by_nothing_is_the_identity():
    image = torch.rand(3, 40, 50)
    assert torch.allclose(slides.augment.Elastic(share=0.0)(image), image, atol=1e-5)
    assert (slides.augment.Elastic(share=0.02)(image) - image).abs().mean() > 0.05


def test_spearman_is_the_correlation_of_ranks():
    predicted, labels = torch.randn(40), torch.randint(0, 9, (40,)).float()  # with ties
    wanted = np.corrcoef(rankdata(predicted), rankdata(labels))[0, 1]
    assert slides.metrics.spearman(predicted, labels) == pytest.approx(wanted)
    assert np.isnan(slides.metrics.spearman(torch.ones(5), torch.arange(5.0)))


def test_auc_is_the_share_of_pairs_in_order():
    logits, labels = torch.randn(50, 3), torch.randint(0, 2, (50,))
    shares = logits.double().softmax(1)
    for label in (0, 1):
        inside, outside = shares[labels == label, label], shares[labels != label, label]
        wanted = (inside[:, None] > outside).double().mean().item()
        assert slides.metrics.auc_per_class(logits, labels)[label] == pytest.approx(wanted)
    assert np.isnan(slides.metrics.auc_per_class(logits, labels)[2])


@pytest.mark.parametrize("size, layers", [(2048, 22), (4096, 25), (8192, 28)])
def test_layers_of_the_papers_networks(size, layers):
    network = slides.network.slide_network(slides.network.LAYERS[size]).to("meta")
    kinds = (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AdaptiveMaxPool2d, torch.nn.Linear)
    counted = [layer for layer in network if isinstance(layer, kinds)]
    assert len(counted) == layers
    channels = [layer.out_channels for layer in counted if isinstance(layer, torch.nn.Conv2d)]
    assert channels == [32, 32, 64, 64, 128, 128, 256, 256] + [512] * (len(channels) - 8)
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in network) == 4
    before_last_pooling = network[:-4](torch.empty(1, 3, size, size, device="meta"))
    assert before_last_pooling.shape == (1, 512, 32, 32)
    assert network[-2].p == 0.5


def test_weights_are_initialised_after_he():
    weight = slides.network.slide_network(22)[10].weight
    assert weight.shape == (128, 64, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_a_streamed_step_equals_the_plain_one():
    network = slides.network.slide_network(22, 2, width=2, dropout=0.0).double().train()
    image = torch.randn(2, 3, 160, 190, dtype=torch.float64, requires_grad=True)
    assert_streams(network, image, tile=130, tolerance=1e-9, at_least_tiles=4)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return slides.make_slides.make_slides(tmp_path_factory.mktemp("slides"), count=6, size=200)


def arguments(labels, folder, *more):
    setting = "--size 128 --spacing 1 --width 2 --batch 3 --rate 1e-2 --tile 110 --epochs 2"
    return [str(labels), "--folder", str(folder), *setting.split(), *more]


@pytest.fixture(scope="module")
def whole(labels, tmp_path_factory):
    """The folder and the history of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, slides.train.main(arguments(labels, folder))


def test_synthetic_slides_are_seeded_and_show_their_label(labels, tmp_path):
    again = slides.make_slides.make_slides(tmp_path, count=6, size=200)
    assert again.read_text() == labels.read_text()
    for row, copy in zip(slides.data.read_rows(labels), slides.data.read_rows(again), strict=True):
        image = slides.pyramid.open_slide(row.path).read(1.0).float()
        assert torch.equal(image, slides.pyramid.open_slide(copy.path).read(1.0).float())
    rows = slides.data.read_rows(labels)
    dark = [(slides.data.read_tissue(row.path, 1.0).float().mean(0) < 110).double().mean().item() for row in rows]
    assert slides.metrics.spearman(torch.tensor(dark), torch.tensor([row.label for row in rows])) > 0.9
    assert [row.split for row in rows] == ["train", "train", "tune"] * 2
    slides.make_slides.draw_slides(labels, str(tmp_path / "slides.png"))
    assert (tmp_path / "slides.png").stat().st_size > 10_000


def test_moments_are_those_of_all_pixels(labels):
    images = slides.data.SlideImages(slides.data.read_rows(labels)[:3], 64, 1.0, train=False)
    values = np.concatenate([images.tissue(i).flatten(1).numpy() / 255 for i in range(3)], 1)
    mean, deviation = slides.data.moments(images)
    assert np.allclose(mean, values.mean(1), atol=1e-6)
    assert np.allclose(deviation, values.std(1), atol=1e-6)


def test_an_image_depends_on_seed_epoch_and_place_alone(labels, tmp_path):
    rows = slides.data.read_rows(labels)
    first, second = (slides.data.SlideImages(rows, 64, 1.0, train=True, cache=c) for c in (None, tmp_path))
    wanted, _ = first[1]
    torch.rand(7)
    assert torch.equal(second[1][0], wanted)
    assert torch.equal(second[1][0], wanted)  # now from the cache
    assert len(list(tmp_path.iterdir())) == 1
    second.epoch = 1
    assert not torch.equal(second[1][0], wanted)


class KilledError(Exception):
    """Stands for a signal in the middle of an epoch."""


def test_a_killed_run_resumes_to_the_result_of_an_uninterrupted_one(labels, whole, tmp_path, monkeypatch):
    steps, step = [], torch.optim.Adam.step

    def killed_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:  # the second step of the second epoch
            raise KilledError
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", killed_step)
    with pytest.raises(KilledError):
        slides.train.main(arguments(labels, tmp_path))
    monkeypatch.undo()
    torch.manual_seed(99)  # a new process has another state
    folder, history = whole
    assert slides.train.main(arguments(labels, tmp_path)) == history
    states = [torch.load(run / "last.pt", weights_only=True) for run in (folder, tmp_path)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert torch.equal(states[0]["random"]["cpu"], states[1]["random"]["cpu"])
    assert states[0]["scheduler"]["last_epoch"] == 2
    assert states[0]["scheduler"]["_last_lr"] == pytest.approx([1e-2 * 0.99**2])
    assert len(states[0]["history"]) == 2


def test_a_run_does_not_go_on_with_other_options(labels, whole):
    with pytest.raises(SystemExit, match="other options: batch, rate"):
        slides.train.main(arguments(labels, whole[0], "--rate", "1", "--batch", "2"))


def test_a_checkpoint_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    slides.checkpoint.write(tmp_path / "last.pt", {"epoch": 1})

    def torn(state, file):
        file.write(b"half a file")
        raise KilledError

    monkeypatch.setattr(torch, "save", torn)
    with contextlib.suppress(KilledError):
        slides.checkpoint.write(tmp_path / "last.pt", {"epoch": 2})
    assert torch.load(tmp_path / "last.pt") == {"epoch": 1}


def test_accumulated_gradients_are_those_of_the_batch(labels, tmp_path):
    options = slides.train.options_of(arguments(labels, tmp_path, "--no-norm", "--dropout", "0"))
    images, _ = slides.train.image_sets(options)
    network = slides.network.slide_network(width=2, dropout=0.0, norm=False)
    found = []
    for options.together in (1, 3):
        network.zero_grad()
        for image, label, count in slides.train.batches(images, options):
            if count == 3:
                (slides.train.loss_sum(network(image), label) / count).backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(*found, strict=True))


def test_classes_are_trained_and_measured_too(labels, tmp_path):
    rows = slides.data.read_rows(labels)
    csv = labels.with_name("classes.csv")
    csv.write_text("\n".join(["slide,label", *(f"{row.path.name},{int(row.label > 1.5)}" for row in rows)]))
    more = ("--classes", "2", "--epochs", "1", "--tune-share", "0.5", "--no-norm", "--dropout", "0")
    (row,) = slides.train.main(arguments(csv, tmp_path, *more))
    assert row.keys() == {"epoch", "loss", "tune_loss", "score", "auc_0", "auc_1"}
    assert (tmp_path / "best.pt").exists()


def test_best_epoch():
    rows = [{"score": score} for score in (float("nan"), 0.2, 0.5, 0.5)]
    assert slides.train.best(rows) == 3
    assert slides.train.best(rows[:1]) == 1
