"""Predictions of image files: the values of the plain network; broken images do not stop the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from segmenters import Segmenter, picture, plain, scores, strided, vector

import fxstream
from fxstream.prediction.images import open_image

zarr, tifffile = pytest.importorskip("zarr"), pytest.importorskip("tifffile")


def tiled(path, pixels, levels=1, **options):
    """A pyramidal TIFF in tiles, a quarter of a micrometre per pixel."""
    options = {"tile": (64, 64), "photometric": "rgb", "resolutionunit": "CENTIMETER"} | options
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            part = pixels[:: 2**level, :: 2**level]
            more = {"subifds": levels - 1} if not level else {"subfiletype": 1}
            file.write(part, resolution=(40000 / 2**level,) * 2, **more, **options)


def stored(result):
    return zarr.open_group(str(result), mode="r")["0"][:]


def of_formats(folder):
    """One image in every format that is written here, by its name."""
    pixels = picture(130, 170)
    image = pytest.importorskip("PIL.Image")
    tiled(folder / "tiles.tif", pixels, compression="zlib")
    tifffile.imwrite(folder / "planes.ome.tif", np.moveaxis(pixels, -1, 0), metadata={"axes": "CYX"})
    np.save(folder / "array.npy", pixels)
    image.fromarray(pixels).save(folder / "lossless.png")
    zarr.save_array(str(folder / "plain.zarr"), pixels)
    group = zarr.open_group(str(folder / "ome.ome.zarr"), mode="w")
    group.create_array("fine", data=np.moveaxis(pixels, -1, 0)[None, :, None], chunks=(1, 3, 1, 64, 64))
    steps = [{"type": "scale", "scale": [1, 1, 1, 500, 500]}]
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    dataset = {"path": "fine", "coordinateTransformations": steps}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}
    return pixels, sorted(path for path in folder.iterdir())


def test_every_format_gives_the_same(tmp_path):
    (tmp_path / "images").mkdir()
    pixels, paths = of_formats(tmp_path / "images")
    network = scores()
    outcome = fxstream.predict(network, paths, tmp_path / "out", memory="2MiB", normalise="unit")
    assert (outcome.failed, len(outcome.done)) == ({}, 6)
    expected = plain(network, pixels, 255)
    for path in paths:
        np.testing.assert_allclose(stored(outcome.done[path]), expected, atol=1e-5, err_msg=path.name)
    names = {"array", "lossless", "ome", "plain", "planes", "tiles"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".job",
        *(f"{name}.ome.zarr" for name in names),
    }


def test_the_size_of_pixels_is_carried_over(tmp_path):
    tiled(tmp_path / "slide.tif", picture(900, 700), levels=3)
    for arguments, expected in [({}, 0.25), ({"level": 1}, 0.5), ({"spacing": 1.02}, 1.0)]:
        out = tmp_path / str(expected)
        outcome = fxstream.predict(strided(), tmp_path / "slide.tif", out, memory="1GiB", **arguments)
        (result,) = outcome.done.values()
        (multiscale,) = zarr.open_group(str(result)).attrs["ome"]["multiscales"]
        assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
        scale, move = multiscale["datasets"][0]["coordinateTransformations"]
        np.testing.assert_allclose(scale["scale"], [1, 4 * expected, 4 * expected])
        np.testing.assert_allclose(move["translation"], [0, 4 * expected, 4 * expected])  # pixel 0 reads 0 .. 8
    with pytest.raises(fxstream.InputError, match="give level or spacing"):
        fxstream.predict(strided(), tmp_path / "slide.tif", tmp_path, level=1, spacing=1)


@pytest.mark.parametrize("format", ["ome-zarr", "tiff"])
def test_coarser_levels(format, tmp_path, monkeypatch):
    """Means of scores, every second pixel of classes; chunks of the levels do not show."""
    from fxstream.prediction import results

    monkeypatch.setattr(results, "SMALLEST", 40)
    monkeypatch.setitem(results.CHUNK, 2, 33)
    pixels = picture(131, 170)
    np.save(tmp_path / "one.npy", pixels)
    for name, network in (("scores", scores()), ("classes", Segmenter().eval())):
        outcome = fxstream.predict(network, tmp_path / "one.npy", tmp_path / name, memory="2MiB", format=format)
        (result,) = outcome.done.values()
        fine = plain(network, pixels)
        if format == "tiff":
            with tifffile.TiffFile(result) as file:
                assert file.is_bigtiff
                levels = [page.asarray().reshape(-1, *page.shape[-2:]) for page in file.series[0].levels]
        else:
            levels = [array[:] for _, array in sorted(zarr.open_group(str(result)).arrays())]
        assert [level.shape[1:] for level in levels] == [(131, 170), (66, 85), (33, 43), (17, 22)][: len(levels)]
        assert len(levels) == 4 - (name == "never")
        np.testing.assert_allclose(levels[0], fine, atol=1e-5)
        if name == "classes":
            assert np.array_equal(levels[1], fine[:, ::2, ::2])
            assert len(np.unique(fine)) == 3
        else:
            padded = np.pad(fine, ((0, 0), (0, 1), (0, 0)), mode="edge")
            np.testing.assert_allclose(levels[1], padded.reshape(3, 66, 2, 85, 2).mean((2, 4)), atol=1e-5)


def test_spacings_of_files(tmp_path):
    """OME metadata in other units, Aperio's description, the resolution by the inch, and a file without."""
    pixels, planes = picture(60, 50), np.zeros((3, 60, 50), np.uint8)
    size = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "ome.ome.tif", planes, metadata={"axes": "CYX", **size})
    aperio = "Aperio Image Library v1\r\n60x50|AppMag = 40|MPP = 0.25"
    tifffile.imwrite(
        tmp_path / "a.svs", pixels, tile=(64, 64), photometric="rgb", description=aperio, metadata=None
    )
    tifffile.imwrite(tmp_path / "inch.tif", pixels, resolution=(101600, 101600), resolutionunit="INCH")
    tifffile.imwrite(tmp_path / "none.tif", pixels, resolutionunit="NONE")
    for name, pixel in (("ome.ome.tif", 0.25), ("a.svs", 0.25), ("inch.tif", 0.25), ("none.tif", None)):
        opened = open_image(tmp_path / name)
        assert opened.levels[0].pixel == (pytest.approx(pixel) if pixel else None), name
        if pixel:
            assert opened.level(None, 0.26) is opened.levels[0]
        with pytest.raises(
            fxstream.InputError, match=r"no level at 0.5 micrometres|does not tell the size of its"
        ):
            opened.level(None, 0.5)
        opened.close()


def test_slides_by_openslide(tmp_path, monkeypatch):
    """Where imagecodecs is not installed, which decodes the JPEG of scanners for tifffile."""
    pytest.importorskip("openslide")
    pytest.importorskip("imagecodecs")
    tiled(tmp_path / "slide.tif", picture(200, 260), compression="jpeg")
    network = scores()
    outcome = fxstream.predict(network, tmp_path / "slide.tif", tmp_path / "both", memory="2MiB")
    assert outcome.failed == {}
    monkeypatch.setattr("fxstream.prediction.images.is_decodable", lambda path: False)
    fxstream.predict(network, tmp_path / "slide.tif", tmp_path / "openslide", memory="2MiB")
    first, second = (zarr.open_group(f"{tmp_path}/{name}/slide.ome.zarr") for name in ("both", "openslide"))
    np.testing.assert_allclose(first["0"][:], second["0"][:], rtol=1e-3, atol=2)  # decoders of JPEG differ
    steps = [group.attrs["ome"]["multiscales"][0]["datasets"][0] for group in (first, second)]
    scales = [one["coordinateTransformations"][0]["scale"] for one in steps]
    np.testing.assert_allclose(scales, [[1, 0.25, 0.25]] * 2)


def test_vectors(tmp_path):
    pixels = picture(300, 200)
    np.save(tmp_path / "one.npy", pixels)
    outcome = fxstream.predict(
        vector(), tmp_path / "one.npy", tmp_path / "out", memory="2MiB", normalise="imagenet"
    )
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = plain(vector(), (pixels / 255 - mean) / deviation)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "one.npy"), expected[None], atol=1e-5)
    assert outcome.done == {tmp_path / "one.npy": tmp_path / "out" / "one.npy"}


def test_types(tmp_path):
    np.save(tmp_path / "one.npy", picture(60, 50).astype(np.uint16) * 257)
    network = scores()
    for dtype, tolerance in (("float16", 2e-3), ("float64", 1e-5)):
        arguments = {"normalise": "unit", "dtype": dtype, "memory": "2MiB"}
        fxstream.predict(network, tmp_path / "one.npy", tmp_path / dtype, **arguments)
        array = stored(tmp_path / dtype / "one.ome.zarr")
        assert array.dtype == dtype
        np.testing.assert_allclose(array, plain(network, picture(60, 50), 255), atol=tolerance)
    outcome = fxstream.predict(network, tmp_path / "one.npy", tmp_path / "bytes", dtype="uint8")
    assert "convert in the model" in outcome.failed[tmp_path / "one.npy"]


def broken(folder):
    """Images that cannot be predicted, with what is said of each."""
    tiled(folder / "whole.tif", picture(200, 200))
    (folder / "cut.tif").write_bytes((folder / "whole.tif").read_bytes()[:20000])
    (folder / "no.tif").write_bytes(b"nonsense" * 100)
    (folder / "text.txt").write_text("nonsense")
    np.save(folder / "long.npy", np.zeros((20, 30, 40), np.uint8))
    np.save(folder / "complex.npy", np.zeros((20, 30, 3), np.complex64))
    np.save(folder / "four.npy", np.zeros((20, 30, 4), np.uint8))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    (folder / "folder").mkdir()
    zarr.open_group(str(folder / "group.zarr"), mode="w").create_array("inside", shape=(3, 3), dtype="u1")
    return {
        "cut.tif": "is cut off: its tiles end at byte",
        "no.tif": "cannot be opened: TiffFileError",
        "text.txt": "of no format that is read here: .tif",
        "long.npy": "does not name its axes: give a layout",
        "complex.npy": "complex image",
        "four.npy": "expected input[1, 4, 20, 30] to have 3 channels|to have 3 channels, but got 4",
        "picture.png": "cannot be opened: OSError|cannot be opened: UnidentifiedImageError",
        "folder": "is no zarr store|is a zarr group and no OME-Zarr",
        "group.zarr": "name an array of it (it has",
        "absent.tif": "there is no file",
    }


def test_broken_images_are_told_and_the_others_go_on(tmp_path):
    messages = broken(tmp_path)
    paths = [*(tmp_path / name for name in messages), tmp_path / "whole.tif"]
    lines = []
    outcome = fxstream.predict(scores(), paths, tmp_path / "out", memory="5MiB", say=lines.append)
    assert list(outcome.done) == [tmp_path / "whole.tif"]
    assert len(outcome.failed) == len(messages) == len(lines) - 1
    for name, message in messages.items():
        error = outcome.failed[tmp_path / name]
        assert any(part in error for part in message.split("|")), (name, error)
    assert "11 images: 1 done (1 by this process), 10 failed\nfailed: " in str(outcome)
    again = fxstream.predict(scores(), paths, tmp_path / "out", memory="5MiB")
    assert (again.here, len(again.done), len(again.failed)) == (
        (),
        1,
        10,
    )


def test_a_store_that_vanishes_is_told(tmp_path, monkeypatch):
    """Its chunks would read as zeros."""
    zarr.save_array(str(tmp_path / "one.zarr"), picture(100, 90))
    read = fxstream.Source.read

    def vanishing(source, box):
        if (tmp_path / "one.zarr").exists():
            (tmp_path / "one.zarr").rename(tmp_path / "elsewhere")
        return read(source, box)

    monkeypatch.setattr(fxstream.Source, "read", vanishing)
    outcome = fxstream.predict(scores(), tmp_path / "one.zarr", tmp_path / "out")
    assert "is gone since it was opened" in outcome.failed[tmp_path / "one.zarr"]
    assert not (tmp_path / "out" / "one.ome.zarr").exists()


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[3])
import fxstream
from segmenters import scores
resource.setrlimit(resource.RLIMIT_FSIZE, (60000, resource.RLIM_INFINITY))
outcome = fxstream.predict(scores(), sys.argv[1], sys.argv[2], memory="1MiB", format=sys.argv[4])
print(*outcome.failed.values())
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("format", ["ome-zarr", "tiff"])
def test_a_disk_that_is_full(format, tmp_path):
    """The image fails with the error of the system; nothing half-written is a result; the next start continues."""
    np.save(tmp_path / "one.npy", np.random.default_rng(0).integers(0, 256, (300, 290, 3), dtype=np.uint8))
    arguments = [tmp_path / "one.npy", tmp_path / "out", Path(__file__).parent, format]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", FULL, *map(str, arguments)]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".job"]
    outcome = fxstream.predict(scores(), tmp_path / "one.npy", tmp_path / "out", memory="1MiB", format=format)
    (result,) = outcome.done.values()
    array = stored(result) if format == "ome-zarr" else tifffile.imread(result)
    np.testing.assert_allclose(array, plain(scores(), np.load(tmp_path / "one.npy")), rtol=1e-4, atol=1e-3)


def test_a_repaired_image_is_done_by_the_next_start(tmp_path):
    path = tmp_path / "one.tif"
    path.write_bytes(b"nonsense")
    assert path in fxstream.predict(scores(), path, tmp_path / "out").failed
    tiled(path, picture(100, 90))
    outcome = fxstream.predict(scores(), path, tmp_path / "out", memory="2MiB")
    assert (list(outcome.done), outcome.failed) == ([path], {})
    np.testing.assert_allclose(stored(outcome.done[path]), plain(scores(), picture(100, 90)), rtol=1e-4, atol=1e-4)
    assert sorted(one.suffix for one in (tmp_path / "out" / ".job").iterdir()) == [".done", ".json"]


def test_finished_work_is_not_done_again(tmp_path):
    np.save(tmp_path / "one.npy", picture(40, 50))
    np.save(tmp_path / "two.npy", picture(50, 40))
    paths = [tmp_path / "one.npy", tmp_path / "two.npy"]
    first = fxstream.predict(scores(), paths[0], tmp_path / "out")
    assert first.here == (paths[0],)
    second = fxstream.predict(scores(), paths, tmp_path / "out")
    assert second.here == (paths[1],)
    assert list(second.done) == paths
    (tmp_path / "out" / "two.ome.zarr").rename(tmp_path / "elsewhere")
    assert fxstream.predict(scores(), paths, tmp_path / "out").here == (paths[1],)


def test_another_job_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", picture(40, 50))
    fxstream.predict(scores(), tmp_path / "one.npy", tmp_path / "out")
    with pytest.raises(fxstream.InputError, match=r"of another job \(weights was .* and is .*another folder"):
        fxstream.predict(scores(seed=1), tmp_path / "one.npy", tmp_path / "out")
    with pytest.raises(fxstream.InputError, match=r"\(normalise was None and is"):
        fxstream.predict(scores(), tmp_path / "one.npy", tmp_path / "out", normalise="unit")


def test_names_that_are_taken(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "one.npy", tmp_path / "a" / "one.npy"):
        np.save(path, picture(40, 50))
    with pytest.raises(fxstream.InputError, match=r"would have results of one name \(one\)"):
        fxstream.predict(scores(), [tmp_path / "one.npy", tmp_path / "a" / "one.npy"], tmp_path / "out")
    fxstream.predict(scores(), tmp_path / "one.npy", tmp_path / "out")
    outcome = fxstream.predict(scores(), tmp_path / "a" / "one.npy", tmp_path / "out")
    assert "is there already and is not of this image" in outcome.failed[tmp_path / "a" / "one.npy"]


class Two(torch.nn.Module):
    def forward(self, image):
        return image.float() * 2, image.float() * 3


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"model": scores().train()}, "in training mode: call model.eval"),
        ({"weights": "w.pt"}, "load them into the module"),
        ({"model": "torchvision/resnet18"}, "is built without weights"),
        ({"device": "cuda"}, "move the model"),
        ({"normalise": "1,2/0,1"}, "is no normalisation: give unit, imagenet"),
        ({"format": "png"}, "give ome-zarr or tiff"),
        ({"dtype": "byte8"}, "dtype='byte8' is none: give uint8"),
        ({"images": []}, "needs an image"),
    ],
)
def test_mistakes(arguments, match, tmp_path):
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.predict(**{"model": scores(), "images": "a.npy", "out": tmp_path / "out"} | arguments)
    assert not (tmp_path / "out").exists()


def test_a_network_of_two_results(tmp_path):
    np.save(tmp_path / "one.npy", picture(40, 50))
    outcome = fxstream.predict(Two().eval(), tmp_path / "one.npy", tmp_path / "out")
    assert "the network returns 2 results" in outcome.failed[tmp_path / "one.npy"]


def test_a_network_of_batches_and_of_volumes(tmp_path):
    volume = np.random.default_rng(0).random((5, 40, 50), dtype=np.float32)
    np.save(tmp_path / "planes.npy", volume)
    network = scores(channels=1)
    fxstream.predict(network, tmp_path / "planes.npy", tmp_path / "out", layout="NYX", memory="2MiB")
    with torch.no_grad():
        expected = network(torch.from_numpy(volume)[:, None])
    np.testing.assert_allclose(stored(tmp_path / "out" / "planes.ome.zarr"), expected, atol=1e-5)
    of_volumes = torch.nn.Conv3d(1, 2, 3, padding=1).eval()
    fxstream.predict(of_volumes, tmp_path / "planes.npy", tmp_path / "volumes", layout="ZYX", memory="2MiB")
    with torch.no_grad():
        expected = of_volumes(torch.from_numpy(volume)[None, None])[0]
    np.testing.assert_allclose(stored(tmp_path / "volumes" / "planes.ome.zarr"), expected, atol=1e-5)
    job = json.loads((tmp_path / "out" / ".job" / "job.json").read_text())
    assert job["layout"] == "NYX"
