"""A pickle is interpreted, never run: what it may say, and what happens when it says more."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffinst.weights.unpickle import Array, Machine, RefusedPickle, Storage


def read(content: bytes, **settings: Any) -> Any:
    return Machine(io.BytesIO(content), settings.pop("budget", 4 * len(content)), **settings).run()


def plain(value: Any) -> Any:
    """Arrays as numpy has them, in any depth of dicts and lists."""
    if isinstance(value, Array):
        return value.numpy()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


class TestData:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_plain_data_of_every_protocol(self, protocol: int) -> None:
        shared = [1, 2]
        value = {"a": shared, "b": (None, True, False, -7, 2**70, 1.5, "Ω", b"\x00\xff"), "c": [], "d": shared, "e": ()}
        assert read(pickle.dumps(value, protocol)) == value

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i8", "u1", "?", "i2"])
    @pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
    def test_arrays_of_every_protocol(self, protocol: int, dtype: str, shape: tuple[int, ...]) -> None:
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        found = read(pickle.dumps(array, protocol)).numpy()
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=")
        assert found.flags.writeable

    def test_fortran_order_and_scalars(self) -> None:
        array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
        for protocol in (2, 5):
            np.testing.assert_array_equal(read(pickle.dumps(array, protocol)).numpy(), array)
        assert read(pickle.dumps(np.float32(1.5))) == 1.5

    def test_as_python_2_wrote_it(self) -> None:
        # pickle.dumps({"w": np.array([1.0, -2.0], "f4")}, 2) of Python 2.7 with numpy 1.16, byte by byte.
        content = (
            b"\x80\x02}q\x00U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
            b"U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff"
            b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
        )
        np.testing.assert_array_equal(pickle.loads(content, encoding="latin1")["w"], np.array([1, -2], np.float32))
        assert read(content)["w"].numpy().tolist() == [1, -2]

    def test_containers_of_the_standard_library_become_dicts(self) -> None:
        value = {"o": OrderedDict(b=1, a=2), "c": Counter("aab"), "d": defaultdict(list, {"k": [1]})}
        assert read(pickle.dumps(value | {"d": {}})) == {"o": {"b": 1, "a": 2}, "c": {"a": 2, "b": 1}, "d": {}}
        with_attributes = OrderedDict(a=1)
        with_attributes._metadata = OrderedDict(version=2)
        assert read(pickle.dumps(with_attributes)) == {"a": 1}

    def test_whole_file_of_detectron2(self) -> None:
        model = {"stem.conv1.weight": np.ones((2, 3), np.float32), "n": np.array(3)}
        value = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
        found = plain(read(pickle.dumps(value, 2)))
        assert found.keys() == value.keys()
        np.testing.assert_array_equal(found["model"]["stem.conv1.weight"], model["stem.conv1.weight"])


class Calling:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def attacks(mark: Path) -> dict[str, Any]:
    """Objects whose pickles, when loaded, make the file `mark` or do what no weights need."""
    touch = f"touch {mark}"
    evil = Calling(os.system, touch)
    write = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": evil,
        "builtins.eval": Calling(eval, write),
        "builtins.exec": Calling(exec, write),
        "subprocess": Calling(subprocess.getoutput, touch),
        "in a list": [1, [evil]],
        "as a key": {("a", Calling(os.system, touch)): 1},
        "in an array's place": {"model": {"w": evil}},
        "attribute of something": Calling(getattr, OrderedDict, "fromkeys"),
        "object array": np.array([evil, None], dtype=object),
        "object array of numbers": np.array([1, "a"], dtype=object),
        "structured array": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
        "text array": np.array(["a"]),
        "date array": np.array(["2020-01-01"], dtype="M8[D]"),
        "_reconstruct of a subclass": Calling(np.zeros(1).__reduce__()[0], np.matrix, (0,), b"b"),
        "_reconstruct of another class": Calling(np.zeros(1).__reduce__()[0], Path, (0,), b"b"),
        "state of another shape": Calling(
            np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b", state=(1, (10**9,), np.dtype("f4"), False, b"1234")
        ),
        "state with objects": Calling(
            np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, [evil])
        ),
        "attributes of a class": Calling(OrderedDict, state=(None, {"__class__": dict})),
        "factory of a defaultdict": defaultdict(evil.parts[0]),
        "path": Path("x"),
        "lambda's module": Calling(__import__, "this"),
        "function of numpy": Calling(np.load, str(mark)),
        "codec": Calling(__import__("codecs").encode, b"x", "rot13"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_attack_does_nothing_but_raise(name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    try:
        content = pickle.dumps(attacks(mark)[name], protocol)
    except pickle.PicklingError:
        pytest.skip("this protocol cannot write it")
    with pytest.raises(RefusedPickle) as raised:
        plain(read(content))
    assert "\n" not in str(raised.value)
    assert not mark.exists()


def test_the_attacks_work_elsewhere(tmp_path: Path) -> None:
    # Else the test above would prove nothing.
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(attacks(mark)["os.system"]))
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'touch x'\ntR.", "asks for 'os.system', which is refused"),
        (b"(S'touch x'\nios\nsystem\n.", "asks for 'os.system', which is refused"),
        (b"(cos\nsystem\nS'touch x'\no.", "asks for 'os.system', which is refused"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for 'os.system', which is refused"),
        (b"\x80\x04\x8c\x0fnumpy\nos.system\x8c\x06system\x93.", "which is refused"),
        (b"\x80\x02cnumpy\nndarray\n(K\x01tR.", "allowed as a name only"),
        (b"\x80\x02cnumpy\nndarray\n}b.", "sets attributes of something that is no array"),
        (b"\x80\x02\x82\x01.", "instruction EXT1 is not allowed"),
        (b"\x80\x02K\x01Q.", "instruction BINPERSID is not allowed"),
        (b"\x80\x04K\x01)}\x92.", "instruction NEWOBJ_EX is not allowed"),
        (b"\x80\x02K\x01)R.", "calls something that is no name"),
        (b"\x80\x02]K\x01K\x02s.", "corrupt"),
        (b"\x80\x02K\x01K\x02a.", "corrupt"),
        (b"\x80\x02a.", "truncated, corrupt or not a pickle"),
        (b"\x80\x02h\x07.", "truncated, corrupt or not a pickle"),
        (b"\x80\x02\x85.", "corrupt"),
        (b"\x80\x02.", "truncated, corrupt or not a pickle"),
        (b"", "truncated, corrupt or not a pickle"),
        (b"hello", "truncated, corrupt or not a pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "truncated, corrupt or not a pickle"),
        (b"\x80\x02T\xff\xff\xff\x7f", "truncated, corrupt or not a pickle"),
    ],
)
def test_hand_made_pickles_are_refused_by_name(content: bytes, message: str) -> None:
    with pytest.raises(RefusedPickle, match=message):
        read(content)


def test_every_truncation_is_refused() -> None:
    content = pickle.dumps({"model": {"w": np.arange(3.0)}, "__author__": "x"}, 2)
    for length in range(len(content)):
        with pytest.raises(RefusedPickle):
            read(content[:length])


def test_every_changed_byte_is_refused_or_harmless() -> None:
    content = bytearray(pickle.dumps({"model": {"w": np.arange(3.0, dtype="f4")}}, 2))
    for position in range(len(content)):
        for value in (0, 0x2E, 0x52, 0x62, 0xFF, content[position] ^ 1):
            changed = bytes(content[:position]) + bytes([value]) + bytes(content[position + 1 :])
            with contextlib.suppress(RefusedPickle):
                plain(read(changed))


# Tuples in tuples; in the second each holds its part twice, so that a walk through it takes 2^40 steps.
DEEP, SHARED = b")" + b"\x85" * 300_000, b")" + b"2\x86" * 40
READ = """
import io, sys
from diffinst.weights.unpickle import Machine, RefusedPickle
content = sys.stdin.buffer.read()
try:
    Machine(io.BytesIO(content), 4 * len(content)).run()
except RefusedPickle as error:
    print(error)
"""


@pytest.mark.parametrize("nested", [DEEP, SHARED], ids=["deep", "shared"])
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"}", b"Ns.", "a key is a tuple; allowed are texts and numbers"),
        (b"}(", b"Nu.", "a key is a tuple"),
        (b"(", b"Nd.", "a key is a tuple"),
        (b"ccollections\nOrderedDict\n]", b"N\x86a\x85R.", "a key is a tuple"),
        (b"c_codecs\nencode\n\x8c\x01a", b"\x86R.", "allowed for latin1 text only"),
        (b"cnumpy\ndtype\n\x8c\x02f4\x85R(K\x03", b"tb.", "not a plain number"),
        (b"", b".", ""),
    ],
)
def test_nesting_crashes_nothing(nested: bytes, before: bytes, after: bytes, message: str) -> None:
    # Elsewhere, since what goes wrong is a crash of the interpreter or a call that never ends.
    content = b"\x80\x04" + before + nested + after
    done = subprocess.run([sys.executable, "-c", READ], input=content, capture_output=True, timeout=120, check=True)
    assert message in done.stdout.decode()
    assert bool(message) == bool(done.stdout)


def test_keys_are_texts_and_numbers() -> None:
    value = {"a": 1, b"b": 2, 3: 3, 2.5: 4, False: 5, None: 6, 2**64 - 1: 7}
    assert read(pickle.dumps(value)) == read(pickle.dumps(OrderedDict(value))) == value
    for key in (("a", 1), 2**64, frozenset()):
        with pytest.raises(RefusedPickle):
            read(pickle.dumps({key: 1}))
    with pytest.raises(RefusedPickle, match="no list of pairs"):
        read(b"\x80\x04ccollections\nOrderedDict\n\x8c\x02ab\x85R.")


class TestBounds:
    def test_one_block_of_bytes_is_not_copied_without_end(self) -> None:
        array = np.zeros(1000, np.uint8)
        head = pickle.dumps(array, 2)
        # The array's own bytes, put into the memo and used for a new array again and again.
        raw = b"\x80\x02T\xe8\x03\x00\x00" + b"\x00" * 1000 + b"q\x630"
        once = (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M\xe8\x03\x85"
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89h\x63tb0"
        )
        assert len(read(raw + once + b"N.") or b"") == 0
        with pytest.raises(RefusedPickle, match="larger than the file"):
            read(raw + 500 * once + b"N.", budget=100_000)
        assert len(head) < 100_000

    def test_mappings_are_not_copied_without_end(self) -> None:
        entries = b"\x80\x02](" + b"K\x01K\x02\x86" * 1000 + b"eq\x010"
        copies = b"ccollections\nOrderedDict\nh\x01\x85R0" * 1000
        with pytest.raises(RefusedPickle, match="larger than the file"):
            read(entries + copies + b"N.", budget=4 * len(entries + copies))

    def test_shape_must_fit_the_bytes(self) -> None:
        content = pickle.dumps(np.zeros(3, np.float32), 2).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85", 1)
        with pytest.raises(RefusedPickle, match="needs 8589934588 bytes and has 12"):
            read(content)

    def test_a_shape_has_as_many_dimensions_as_numpy_allows(self) -> None:
        content = pickle.dumps(np.zeros((2, 3), np.float32), 2)
        for shape in (b"(" + b"K\x01" * 65 + b"t", b"(\x8a\x09" + b"\x00" * 8 + b"\x01t"):
            with pytest.raises(RefusedPickle, match="no valid type or shape"):
                read(content.replace(b"K\x02K\x03\x86", shape, 1))


class TestTensors:
    STORAGE = Storage("0", "FloatStorage", 12)

    def view(self, offset: Any, size: Any, stride: Any) -> Any:
        content = pickle.dumps((offset, size, stride), 2)
        arguments = read(content)
        call = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x00Q"
        parts = b"".join(pickle.dumps(part, 2)[2:-1] for part in arguments)
        return read(call + parts + b"tR.", persistent=lambda _: self.STORAGE, budget=1000)

    def test_part_of_a_storage(self) -> None:
        found = self.view(2, (2, 3), (4, 1))
        assert (found.storage, found.offset, found.size, found.stride) == (self.STORAGE, 2, (2, 3), (4, 1))

    @pytest.mark.parametrize(
        ("offset", "size", "stride"),
        [
            (0, (13,), (1,)),
            (1, (12,), (1,)),
            (0, (4, 3), (4, 1)),
            (0, (10**6, 10**6), (0, 0)),
            (-1, (1,), (1,)),
            (0, (-1,), (1,)),
            (0, (2,), (-1,)),
            (0, (2, 2), (1,)),
            (0, (2.0,), (1,)),
            (0, [2], [1]),
            (2**62, (2,), (2**62,)),
        ],
    )
    def test_beyond_the_storage_is_refused(self, offset: Any, size: Any, stride: Any) -> None:
        with pytest.raises(RefusedPickle, match="reaches beyond|no valid storage|as many strides"):
            self.view(offset, size, stride)


def test_memo_numbers_cannot_be_made_to_collide() -> None:
    """Integers that differ by 2**61 - 1 have one hash, and a dict of them takes quadratic time."""
    steps = b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 20_000))
    with pytest.raises(RefusedPickle, match="a memo number of 61 bits; at most 32 are allowed"):
        read(b"}" + steps + b".")
    assert read(b"}p4294967295\n.") == {}
