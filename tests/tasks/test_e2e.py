import re
import zipfile

import numpy as np
import pytest

from lorax import tasks
from lorax.tasks import e2e

ROWS = """mr,ref
"name[The Mill], food[French]",The Mill  is\tFrench.
"name[Café Zoë]","Zoë, a café."
"""


def write(folder, train=ROWS, dev=ROWS):
    for name, content in (("trainset.csv", train), ("devset.csv", dev)):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


def archive(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


# -------------------------------------------------------------------------------------- parsing


def test_parse_mr():
    assert e2e.parse_mr("name[The Vaults], customer rating[5 out of 5], near[Café Adriatic]") == (
        ("name", "The Vaults"),
        ("customer rating", "5 out of 5"),
        ("near", "Café Adriatic"),
    )
    assert e2e.parse_mr(" name [ A, B ],food[£20-25] ") == (("name", "A, B"), ("food", "£20-25"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at character 0"),
        ("The Vaults", "at character 0"),
        ("name[]", "at character 0"),
        ("name[ ]", "at character 0"),
        ("[pub]", "at character 0"),
        ("name[The Vaults", "at character 0"),
        ("name[A[B]]", "at character 0"),
        ("name[A], ", "at character 8"),
        ("name[A],, food[B]", "at character 8"),
        ("name[A] food[B]", "at character 8: expected ',' or the end, found 'f'"),
        ("name[A]]", "at character 7: expected ',' or the end, found ']'"),
        ("name[A], name[B]", "gives slot 'name' twice"),
    ],
)
def test_malformed_mr(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        e2e.parse_mr(text)
    assert repr(text) in str(error.value)


# ------------------------------------------------------------------------------- files, in order


PAIRS = [
    ("name = The Mill ; food = French =>", "The Mill is French."),
    ("name = Café Zoë =>", "Zoë, a café."),
]


def test_folder_and_archive_anywhere(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "b")
    files = {"x/trainset.csv": ROWS, "devset.csv": ROWS, "__MACOSX/x/._trainset.csv": "-"}
    packed = archive(tmp_path / "e2e.zip", files)
    for path in (tmp_path, str(tmp_path / "a" / "b"), packed):
        assert e2e.examples(path, "train") == e2e.examples(path, "eval") == PAIRS


def test_byte_order_mark_and_crlf(tmp_path):
    write(tmp_path, train=b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n").encode())
    assert e2e.examples(tmp_path, "train") == PAIRS


def test_real_data(e2e_zip):
    train, dev = e2e.examples(e2e_zip, "train"), e2e.examples(e2e_zip, "eval")
    assert (len(train), len(dev)) == (42_061, 4_672)
    train_mrs, dev_mrs = {prompt for prompt, _ in train}, {prompt for prompt, _ in dev}
    assert (len(train_mrs), len(dev_mrs)) == (4_862, 547)
    assert train_mrs.isdisjoint(dev_mrs)
    assert train[0] == (
        "name = The Vaults ; eatType = pub ; priceRange = more than £30 ; "
        "customer rating = 5 out of 5 ; near = Café Adriatic =>",
        "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30.",
    )


def test_build(vocabulary, e2e_zip):
    config = {"name": "e2e", "path": str(e2e_zip), "n_train": 50, "seed": 0}
    task = tasks.build(config, vocabulary, 512, 20)
    assert len(task.train["tokens"]) == 50 and len(task.eval["tokens"]) == 20
    assert task.note == (
        "e2e: 50 train examples, 4,672 eval examples; evaluates on 20 of these, evenly spaced"
    )
    prompts = set()
    for split, pairs in (("train", e2e.examples(e2e_zip, "train")), ("eval", None)):
        rows = getattr(task, split)
        for i, (row, weight) in enumerate(zip(rows["tokens"], rows["mask"], strict=True)):
            targets = row[1:][weight[1:] == np.float32(1)]
            if pairs:
                assert vocabulary.decode(targets[:-1]) == " " + pairs[i][1]
            else:
                prompts.add(tuple(row[: int(weight.argmax())]))
    assert len(prompts) == 20  # evenly spaced, so no meaning representation comes twice


def test_prompts_are_the_distinct_meanings_with_all_their_texts(vocabulary, e2e_zip):
    config = {"name": "e2e", "path": str(e2e_zip), "n_train": 1}
    prompts = tasks.build(config, vocabulary, 512, 1).prompts
    assert len(prompts) == 630 and sum(len(p.references) for p in prompts) == 4_693
    assert prompts[0].text == "name = Blue Spice ; eatType = coffee shop ; area = city centre =>"
    assert prompts[0].references[:2] == (
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in city centre.",
    )
    train = {prompt for prompt, _ in e2e.examples(e2e_zip, "train")}
    assert train.isdisjoint(p.text for p in prompts)


def test_prompts_of_the_dev_set_without_a_test_set(vocabulary, tmp_path):
    dev = 'mr,ref\n"name[A], food[B]",One.\nname[C],Two.\n"name[A], food[B]",Three.\n'
    config = {"name": "e2e", "path": str(write(tmp_path, dev=dev))}
    assert tasks.build(config, vocabulary, 64).prompts == (
        tasks.Prompt("name = A ; food = B =>", ("One.", "Three.")),
        tasks.Prompt("name = C =>", ("Two.",)),
    )


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "the header is ''; expected 'mr,ref'"),
        ("mr;ref\n", 1, "the header is 'mr;ref'; expected 'mr,ref'"),
        ("mr\nname[A]\n", 1, "the header is 'mr'; expected 'mr,ref'"),
        ("mr,ref\n", 2, "no rows; expected a header 'mr,ref' and rows below it"),
        ("mr,ref\nname[A],A.\nname[B]\n", 3, "the row has 1 fields; expected 2, 'mr,ref'"),
        ("mr,ref\nname[A],a,b\n", 2, "the row has 3 fields; expected 2, 'mr,ref'"),
        ("mr,ref\n,A.\n", 2, "field 'mr' is empty; expected text"),
        ("mr,ref\nname[A], \n", 2, "field 'ref' is empty; expected text"),
        # the bad row starts on line 4: the one before it holds a line break
        ('mr,ref\nname[A],"A\nB."\nA,A.\n', 4, "malformed meaning representation 'A'"),
        ('mr,ref\nname[A],A.\nname[B],"B.\n\n', 3, "unexpected end of data"),
        (b"mr,ref\nname[A],A.\nname[\xe9],B.\n", 3, "bad byte 0xe9; expected UTF-8"),
    ],
)
def test_bad_csv_names_file_and_line(tmp_path, content, line, message):
    write(tmp_path, dev=content)
    label = f"{tmp_path / 'devset.csv'}:{line}: "
    with pytest.raises(ValueError, match="^" + re.escape(label + message)):
        e2e.examples(tmp_path, "eval")
    data = content if isinstance(content, bytes) else content.encode()
    packed = archive(tmp_path / "e2e.zip", {"d/devset.csv": data})
    with pytest.raises(ValueError, match="^" + re.escape(f"{packed}/d/devset.csv:{line}: ")):
        e2e.examples(packed, "eval")


def test_path_errors(tmp_path, vocabulary):
    def build(path):
        tasks.build({"name": "e2e", "path": path}, vocabulary, 64, 8)

    expected = r"e2e-dataset\.zip, or a folder, with trainset\.csv and devset\.csv in it"
    with pytest.raises(ValueError, match=rf"^task\.path: task 'e2e' needs {expected}; none was"):
        build(None)
    with pytest.raises(FileNotFoundError, match=r"^task\.path: '.*none' does not exist; expected"):
        build(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"^task\.path: '.*none' does not exist; expected"):
        e2e.examples(tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match=r"^task\.path: .* has no trainset\.csv; expected"):
        build(str(tmp_path))
    packed = archive(tmp_path / "a.zip", {"trainset.csv": ROWS})
    with pytest.raises(FileNotFoundError, match=r"^task\.path: .*a\.zip' has no devset\.csv"):
        build(str(packed))
    write(tmp_path)
    (tmp_path / "copy").mkdir()
    write(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"^task\.path: .* has 2 files called trainset\.csv \(.*,"):
        build(str(tmp_path))
    with pytest.raises(ValueError, match=r"^task\.path: .* is not a zip archive that can be read"):
        build(str(tmp_path / "trainset.csv"))


def test_damaged_archive(tmp_path):
    packed = archive(tmp_path / "e2e.zip", {"trainset.csv": ROWS}, zipfile.ZIP_STORED)
    packed.write_bytes(packed.read_bytes().replace(b"French", b"Trench"))
    with pytest.raises(ValueError, match=r"^task\.path: .* can be read \(Bad CRC-32"):
        e2e.examples(packed, "train")


def test_too_many_train_examples(tmp_path, vocabulary):
    config = {"name": "e2e", "path": str(write(tmp_path)), "n_train": 3}
    with pytest.raises(ValueError, match=r"^task\.n_train: 3 was given; .* has 2 examples"):
        tasks.build(config, vocabulary, 64, 8)
