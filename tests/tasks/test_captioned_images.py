"""Task `diffusion` on a folder of images with captions, for a pipeline of diffusers."""

import json
import os

import numpy as np
import pytest
from support import require

import lorax
from lorax import config, rundir, tasks
from lorax.analysis import runs
from lorax.models import clip_tokens
from lorax.models.load import skeleton
from lorax.tasks import captioned_images
from lorax.train.batches import train_batches

Image = require("PIL.Image")
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
CAPTIONS = [f"a {shade} {colour} square" for colour in COLOURS for shade in ("dark", "light")]
POSITIONS, WIDTH = 16, 12
UNET = dict(
    sample_size=8, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=WIDTH,
    attention_head_dim=2, layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None, in_channels=3, out_channels=3,
)  # fmt: skip
CLIP = dict(
    hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
MERGES = [("r", "e"), ("re", "d</w>"), ("s", "q"), ("sq", "u"), ("a", "r")]


def vocabulary() -> dict[str, int]:
    """Bytes as CLIP writes them, alone and at the end of a word, the merges, start and end."""
    letters = sorted(tokens_of_bytes())
    words = [*letters, *(f"{x}</w>" for x in letters), *("".join(pair) for pair in MERGES)]
    return {word: i for i, word in enumerate([*words, clip_tokens.START, clip_tokens.END])}


def tokens_of_bytes():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def tokenizer_of(directory, **settings):
    """transformers' tokenizer, saved in a directory."""
    transformers = require("transformers")
    settings = {"model_max_length": POSITIONS} | settings
    made = transformers.CLIPTokenizer(vocab=vocabulary(), merges=MERGES, **settings)
    made.save_pretrained(directory)
    return made


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The directory of a pipeline of random weights: unet, text_encoder, tokenizer."""
    torch, diffusers = require("torch"), require("diffusers")
    transformers = require("transformers")
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("pipeline")
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(directory / "unet")
    tokenizer = tokenizer_of(directory / "tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    described = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **CLIP, **ids)
    text_encoder = transformers.CLIPTextModel(described).eval()
    text_encoder.save_pretrained(directory / "text_encoder")
    (directory / "model_index.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def base(pipeline):
    return lorax.load(str(pipeline))


@pytest.fixture
def folder(tmp_path):
    """Six images of other sizes than the model's, with a text file each."""
    images = tmp_path / "images"
    images.mkdir()
    for n, caption in enumerate(CAPTIONS):
        factor = 0.5 if "dark" in caption else 1.0
        colour = tuple(int(factor * x) for x in COLOURS[caption.split()[2]])
        ending = "png" if n % 2 else "jpg"
        Image.new("RGB", (12 + n, 20), colour).save(images / f"{n}.{ending}")
        (images / f"{n}.txt").write_text(f"{caption}\n")
    return images


def settings(pipeline, folder, **task):
    c = config.default()
    c.base, c.task.name, c.task.path = str(pipeline), "diffusion", str(folder)
    c.task.update(task)
    return c


def built(base, folder, test=0, **task):
    section = settings("", folder, **task).task.to_dict()
    return tasks.build(section, None, 16, 40, base, test=test)


# ------------------------------------------------------------------------------------------- tokens

TEXTS = ["", "A Red  square,\n it's 12!", "café \N{SQUARED OK}", "red " * 30, "<|endoftext|> a"]


@pytest.mark.parametrize("older", [False, True])
def test_tokens_are_those_of_transformers(older, tmp_path):
    """older: files as pipelines have them, of which the map names another token to fill up with."""
    pad = "!" if older else clip_tokens.END
    theirs = tokenizer_of(tmp_path, **({"pad_token": "!"} if older else {}))
    if older:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
        lines = ["#version: 0.2", *map(" ".join, MERGES)]
        (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
        given = {"model_max_length": POSITIONS, "pad_token": clip_tokens.END}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=POSITIONS)
    got, cut = clip_tokens.encode(TEXTS, tmp_path, 77)
    np.testing.assert_array_equal(got, expected["input_ids"])
    assert cut == 1 and got[0, -1] == theirs.convert_tokens_to_ids(pad)


def test_states_are_those_of_transformers(pipeline):
    torch, transformers = require("torch"), require("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    model = transformers.CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    ids = tokenizer(["", *CAPTIONS], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(ids.input_ids).last_hidden_state.numpy()
    got = captioned_images.states(CAPTIONS, pipeline / "text_encoder")
    np.testing.assert_allclose(got.empty, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.captions, expected[1:], rtol=0, atol=1e-5)
    assert np.abs(got.captions[0] - got.captions[1]).max() > 0.01


# --------------------------------------------------------------------------------------------- rows


def test_rows_are_the_images_with_the_states_of_their_captions(base, folder):
    task = built(base, folder, class_dropout=0.5)
    assert task.train["inputs"].shape == (4, 8, 8, 3) and len(task.eval["weight"]) == 2
    states = captioned_images.states(CAPTIONS, base.directory.parent / "text_encoder")
    seen = []
    for rows in (task.train, task.eval):
        for image, condition in zip(rows["inputs"], rows["condition"], strict=True):
            near = np.abs(states.captions - condition).max(axis=(1, 2))
            caption = CAPTIONS[int(near.argmin())]
            assert near.min() < 1e-5
            factor = 0.5 if "dark" in caption else 1.0
            colour = np.array(COLOURS[caption.split()[2]]) * factor
            assert np.abs(image - colour).max() < 8  # JPEG
            seen.append(caption)
    assert sorted(seen) == sorted(CAPTIONS) and "6 different captions" in task.note
    # Dropped captions are the empty one.
    c = settings("", folder)
    c.train.batch_size = 4
    members = [type("Member", (), {"config": c})]
    stack = type("Stack", (), {"members": members, "config": c})
    drawn = train_batches(stack, task, 0, 20)["condition"].reshape(-1, POSITIONS, WIDTH)
    empty = np.all(drawn == states.empty, axis=(1, 2))
    assert 0.3 < empty.mean() < 0.7


def test_metadata_names_images_and_captions(base, folder):
    beside = built(base, folder)
    lines = [
        {"file_name": f"{n}.{'png' if n % 2 else 'jpg'}", "text": caption}
        for n, caption in enumerate(CAPTIONS)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = built(base, folder)
    for name, rows in beside.train.items():
        np.testing.assert_array_equal(listed.train[name], rows)
    (folder / "metadata.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match=r"does not name 1.png \(5 images of the folder are"):
        built(base, folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "a"}\n')
    with pytest.raises(ValueError, match="metadata.jsonl:1: file_name: '../x.png' is no file in"):
        built(base, folder)


def test_images_are_cut_around_their_centre(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("white")
    images, captions = captioned_images.read({"name": "x", "path": str(tmp_path)}, (4, 4, 1))
    np.testing.assert_array_equal(images, np.full((1, 4, 4, 1), 255))
    assert captions == ["white"]


# ------------------------------------------------------------------------------------------- errors


def test_folders_that_do_not_fit(base, folder):
    with pytest.raises(ValueError, match="needs a folder of PNG or JPEG images, .* none was given"):
        built(base, "")
    with pytest.raises(ValueError, match="is no folder; expected a folder of PNG or JPEG images"):
        built(base, folder / "0.jpg")
    with pytest.raises(ValueError, match="task.text_encoder: .* is UNet2D.*, must be clip_text_mo"):
        built(base, folder, text_encoder=os.fspath(base.directory))
    (folder / "3.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match="3.png: not a readable PNG or JPEG file"):
        built(base, folder)
    (folder / "2.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no 2.txt, .* of 2.jpg \(1 of 6 images have"):
        built(base, folder)
    with pytest.raises(ValueError, match=r"task.classes: \(1,\) given, but base .* has texts"):
        built(base, folder, classes=(1,))
    with pytest.raises(FileNotFoundError, match="task.text_encoder: 'nowhere' has no config.json"):
        built(base, folder, text_encoder="nowhere")
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no images; expected a folder of PNG or JPEG"):
        built(base, folder)


def test_latents_are_refused(tmp_path):
    described = {"_class_name": "UNet2DConditionModel"} | UNET | {"in_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps(described))
    c, base = config.default(), skeleton(f"random:{tmp_path}")
    c.task.name = "diffusion"
    with pytest.raises(ValueError, match="has 4 in_channels, such as latents of an autoencoder"):
        tasks.check_base(c.task.to_dict(), base, 16)


# ---------------------------------------------------------------------------------------------- run


@pytest.mark.slow
def test_a_run_and_its_page(pipeline, folder, tmp_path):
    c = settings(pipeline, folder)
    c.method.targets, c.sweep.rank = ("attention", "conv"), (1, 2)
    c.train.update(steps=20, batch_size=4, warmup=0, schedule="constant", lr=1e-2)
    c.eval.update(every=10, batch_size=4, test=0, samples=2, sample_steps=2, guidance=2.0)
    run = lorax.run(c, tmp_path / "run")
    table = runs.summary(run)
    assert (table["final_loss"] < table["base_loss"]).all()
    for made in [*(run.samples(member) for member in table.index), run.base_samples(0)]:
        assert made["images"].shape == (4, 8, 8, 3)
        captions = made["captions"].tolist()
        assert captions[0] == captions[1] != captions[2] and {*captions} < {*CAPTIONS}
    page = (tmp_path / "run" / rundir.REPORT).read_text()
    assert page.count("data:image/png;base64,") == 3 and f"Images of {captions[0]}" in page
    assert "recognised" not in page
