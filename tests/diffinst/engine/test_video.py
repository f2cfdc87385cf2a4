"""Videos: frames and times survive, what is drawn plays, and nothing half-done is left behind."""

from __future__ import annotations

import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffinst.build import seeded_model
from diffinst.checkpoint import save_checkpoint
from diffinst.cli import main
from diffinst.config import Config, DataConfig, ModelConfig, SamplerConfig
from diffinst.engine.predict import find_media, predict
from diffinst.engine.video import open_video, write_video
from diffinst.errors import ConfigError, DataError
from diffinst.model import DiffusionInst

av = pytest.importorskip("av", reason="videos need the extra 'video'")

DATA = DataConfig(shortest_edge_test=48, longest_edge_test=96)
SAMPLER = SamplerConfig(num_proposals=6, max_detections=3)
MODEL = ModelConfig(
    backbone="tiny",
    num_classes=3,
    num_stages=1,
    hidden_dim=16,
    dim_feedforward=16,
    dim_dynamic=4,
    num_attention_heads=2,
    mask_branch_channels=8,
    mask_branch_layers=1,
)


@pytest.fixture(scope="module")
def model() -> DiffusionInst:
    return seeded_model(MODEL, 0)


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A grey field with a bright left half, and a bar that moves."""
    image = np.full((*size, 3), 60, dtype=np.uint8)
    image[:, : size[1] // 2] = 200
    image[: 4 * (number + 1)] //= 2
    return image


def write(
    path: Path, *, num: int = 5, size: tuple[int, int] = (48, 64), rate: Fraction = Fraction(10), **options: Any
) -> Path:
    """times: pts of the frames in thousandths of a second; turned: degrees, as a telephone stores it; still: as 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if "times" in options:
            stream.codec_context.time_base = Fraction(1, 1000)
        if "turned" in options:
            stream.set_display_rotation(options["turned"])
        for number in range(num):
            image = picture(0 if options.get("still") else number, size)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            if "times" in options:
                frame.pts, frame.time_base = options["times"][number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read(path: Path) -> tuple[list[np.ndarray], list[float], Fraction]:
    """Pictures, their times in seconds and the rate of a file, with PyAV alone."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        rate = container.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in frames], [float(frame.time) for frame in frames], rate


@pytest.mark.parametrize("size", [(48, 64), (47, 65), (2, 2), (1, 1)])
def test_size_rate_and_pictures_are_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    pictures = [picture(number, size) for number in range(4)]
    with write_video(tmp_path / "a.mp4", rate=Fraction(30000, 1001), time_base=Fraction(1, 30000)) as add:
        for number, image in enumerate(pictures):
            add(image, 1001 * number)
    found, times, rate = read(tmp_path / "a.mp4")
    assert rate == Fraction(30000, 1001)
    assert times == pytest.approx([number * 1001 / 30000 for number in range(4)], abs=1e-6)
    for image, expected in zip(found, pictures, strict=True):
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).mean() < 4


def test_uneven_times_are_kept_from_the_first_frame_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", num=4, times=[500, 540, 700, 720])
    with open_video(path) as video:
        assert video.num_frames == 4
        times = [float(frame.pts * video.time_base) for frame in video.frames]
    assert times == pytest.approx([0.0, 0.04, 0.2, 0.22], abs=1e-6)


def test_a_video_taken_on_its_side_is_turned(tmp_path: Path) -> None:
    with open_video(write(tmp_path / "a.mp4", num=1, turned=90)) as video:
        (frame,) = video.frames
    assert frame.image.shape == (64, 48, 3)
    # Turned by 90 degrees anticlockwise, the bright left half is below.
    assert frame.image[40:, 20:].mean() > frame.image[:24, 20:].mean() + 80


def test_a_video_is_drawn_and_its_detections_are_written(model: DiffusionInst, tmp_path: Path) -> None:
    write(tmp_path / "in/clip.avi", num=5, size=(60, 90), rate=Fraction(25, 2))
    seen = []
    done = predict(
        model,
        find_media([tmp_path / "in"]),
        tmp_path / "out",
        data=DATA,
        settings=SAMPLER,
        class_names=["disc", "ring", "star"],
        draw_threshold=0.0,
        report=lambda medium, number, total: seen.append((number, total)),
    )
    assert done == 1
    assert seen == [(number, 5) for number in range(1, 6)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "clip.mp4.json"]
    pictures, times, rate = read(tmp_path / "out/clip.mp4")
    originals, original_times, original_rate = read(tmp_path / "in/clip.avi")
    assert rate == original_rate == Fraction(25, 2)
    assert times == pytest.approx(original_times, abs=1e-4)
    assert {image.shape for image in pictures} == {(60, 90, 3)}
    assert all(np.abs(a.astype(int) - b).max() > 60 for a, b in zip(pictures, originals, strict=True))
    results = json.loads((tmp_path / "out/clip.mp4.json").read_text())
    assert sorted({result["image_id"] for result in results}) == list(range(5))
    assert {(result["image_id"], result["time_s"]) for result in results} == {(i, round(i * 0.08, 6)) for i in range(5)}
    assert {result["file_name"] for result in results} == {"clip.avi"}
    assert {tuple(result["segmentation"]["size"]) for result in results} == {(60, 90)}


def test_a_still_scene_gives_still_detections(model: DiffusionInst, tmp_path: Path) -> None:
    media = find_media([write(tmp_path / "clip.mp4", num=3, still=True)])
    predict(model, media, tmp_path / "out", data=DATA, settings=SAMPLER)
    results = json.loads((tmp_path / "out/clip.mp4.json").read_text())
    by_frame = [[result["bbox"] for result in results if result["image_id"] == frame] for frame in range(3)]
    assert by_frame[0] == by_frame[1] == by_frame[2]
    assert by_frame[0]


def test_stopping_leaves_a_shorter_video_that_plays(model: DiffusionInst, tmp_path: Path) -> None:
    media = find_media([write(tmp_path / "a.mp4", num=6), write(tmp_path / "b.mp4")])
    seen: list[int] = []
    done = predict(
        model,
        media,
        tmp_path / "out",
        data=DATA,
        settings=SAMPLER,
        report=lambda *_: seen.append(1),
        stop=lambda: len(seen) >= 2,
    )
    assert done == 0
    assert len(read(tmp_path / "out/a.mp4")[0]) == 2
    results = json.loads((tmp_path / "out/a.mp4.json").read_text())
    assert {result["image_id"] for result in results} == {0, 1}
    assert not (tmp_path / "out/b.mp4").exists()


def test_an_interruption_leaves_nothing(model: DiffusionInst, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(
            model,
            find_media([write(tmp_path / "a.mp4")]),
            tmp_path / "out",
            data=DATA,
            settings=SAMPLER,
            report=interrupt,
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("fault", ["text", "truncated", "sound", "empty"])
def test_what_is_no_video_is_named_and_leaves_nothing(model: DiffusionInst, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "clip.mp4"
    messages = {
        "text": r"clip\.mp4: cannot be read as a video \(Invalid data found when processing input\)",
        "truncated": r"clip\.mp4: (cannot be read as a video|has no pictures: it is damaged)",
        "sound": r"clip\.mp4: has no pictures: .* holds sound alone",
        "empty": r"clip\.mp4: cannot be read as a video",
    }
    if fault == "text":
        path.write_text("no video")
    elif fault == "empty":
        path.touch()
    elif fault == "truncated":
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with pytest.raises(DataError, match=messages[fault]):
        predict(model, find_media([path]), tmp_path / "out", data=DATA, settings=SAMPLER)
    assert list((tmp_path / "out").iterdir()) == []


def test_frames_that_are_lost_are_counted(
    model: DiffusionInst, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "clip.mkv", num=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    predict(model, find_media([path]), tmp_path / "out", data=DATA, settings=SAMPLER)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "diffinst.engine.predict")
    decoded = len(read(tmp_path / "out/clip.mp4")[0])
    assert 0 < decoded < 30
    assert message.endswith(f"clip.mkv: only {decoded} of about 40 frames can be decoded; it may be damaged")


def test_without_the_dependency_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", num=1)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "av" else find_spec(name))
    with pytest.raises(ConfigError, match=r"python -m pip install 'diffinst-bench\[video\]'"):
        find_media([path])


def test_the_command(model: DiffusionInst, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = tmp_path / "model.safetensors"
    config = Config(model=MODEL, data=DATA, sampler=SAMPLER)
    save_checkpoint(checkpoint, model=model.state_dict(), config=config, iteration=1, class_names=("a", "b", "c"))
    clip = write(tmp_path / "clip.mp4", num=2)
    command = ["predict", str(checkpoint), str(clip), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    assert "drew 1 video; all detections are beside" in capsys.readouterr().out
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "is there already, and 1 more. Choose another folder" in error
    assert error.count("\n") == 1
    assert main([*command, "--force"]) == 0
