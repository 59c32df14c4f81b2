"""Reading torch.save's files: real ones, views of every kind, and hostile or damaged ones."""

from __future__ import annotations

import base64
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from checkpoint_files import Archive, Raw, Tensor, contiguous, global_code
from frspec.convert.torch_file import load_state_dict, load_torch_file
from frspec.errors import ConversionError

# A Linear(1, 2)'s state dict with a bfloat16 tensor, a transposed view and a Parameter that is a
# slice, written by torch 2.13: the zip format, then the older one.
REAL_ZIP = (
    "c-p0vU2D@&7{^bOE$iakn=hMF=et&&U6XcA>sv>Z+~mR;5sC;UZQ~Nm+C9nXL}f6LO}+3dh<*xh{Q%w!LA($|L{t"
    "#G_0n^4wwh#g(|O=<NR$8n`JL0}dCrW^cOjHaq77pZ4I|U5+0KGBSvRqnp1<pAYCpOa8B1KP)^uH~hMi`^7q5AB%"
    "d_fNof;Maoi-qmDhtHyp5@Hi7`Pg463cX@g&o%yE1p$tIc~jzt%l$9Dhsj*d@5D$Aqt;-Y0g^E#U!HUHcfnk{U}0"
    "rIYGY3fKcYiTAOb{kIrF8Ue}S%>4_ES)f03PpW2jS2ZlZac9zLjQPnYh=(kB6yUS)i5)9aZelXB4!;qd>hGC}Ng<"
    "-b=djhR(x_4kN)2?x;0hp9;qm2ZXGK>;S0mD9q#IL}Z&QqlQ%=Q3=g9eNTr-NHw!>Yrf2vimhGlwJ8f!DbeI7&7}"
    "jE*sf;}}jDa54a!H$4oeI-D+fY0g>L@<d3jhp^YoPhZ!&=#J0O9iL^!6By1JkbV+8Og@H;0a9xb<Z>^GR3T0#%?H"
    "Q^?{j6EEHJeQ`QU$Busoln0w{XI_x);mM(;@;HHNE4IE3h&>6maMXsn%Z={rqt&cu~9H%;9e%e(a<QU6yzKRlvGM"
    "rUXLF{J$QUrVow={mEGIjey+HQOP?rX!!D0Hu5Io$L*9n*t1>QX8OpA6rdYESh>@J8{>C>tO6!lwtYO=Y2GpgiRU"
    "x(d9^0Pi8dr{C@x-^twcBUsHnf6CdBukjX6wE=CC?O)a49$6vZk<}{7}Z1;!MHsZ_w9ltbPS}MILQHCEc({KAol)"
    "fz(3Q>lvrsmN0;?qITfFu{1CUc2Q#$tT=dT5lq7~Pa*0G(~Kw9D<(-@;@?8fo?U?9Hw7e;mnw3NYBVZ+Q->zy~J1"
    "Jt|IJQ`7%=3Q|T<3VB(Pi%PLrn950cc`B1ridjX<7xIcC6$^!Yp*Te;udFV9N)e7!K$)PhZO(9u8r(o0zX#*$a04"
    "2ND1k$rnp)f>+(gDACaYnS4V^3Q6K(`U5g&s`8yiqu9<Jj4i2NOoV!b1-4Od`POK+)Y)yK8r%86><$F*`?8_x8o_"
    "I7tnn~iJ3xjPWiehX<k{Ab~m8jqf}fVN2X8C?)2)=Psw*H((L^%2L`Ujkc+j$X9rVJ~}Tw_dlvG-B{Q`}Q|>{x66"
)
REAL_LEGACY = (
    "c-noE%Wl&^6o$u_q}0$-?v!h}yIexz=F)6%gitplE;XCkAj`3b*vQy9_P7Y7NZB+Lo`FS|JO;1BBOtNh*iLAXLM_"
    "c$bLPzV|8wSy<*!=!``gy9wRhiNt=7i!^PdXNBOp3kA%qN*Sj27|+B-Z+gE#^S6W9{&gn<wtw|V3RP6YBE(=aGL4"
    "!NBMpLhz&2vnU_FqryrBA`NLrr;`w1XQWY)SMAV16ZJHmZ7GLG9h;bs-)V>#N!F~o&~PZfUH{}>8y$;KJZ}R3y@t"
    "AC$3+!GZBQTW+%L#1)*mP9;I<&?-&{=y3Q7Ib<A`I9MtlNwiU*XcwGiHsIX<s>27rEt!}+*G@IRa9jb*<cbK6!`G"
    "tUE+muk5N)uS5QvTDv__?R!0!~=4R9vMWI4LaqsOqc!A?l`Kbc{x;-h`8WNn0ssyKst1yKuTBoe^->f^!AQcfz-D"
    "z9daOKP^l*+J9|d_*bCQ>NE_vhyqm<SS{@;6Szc`-0tO4<cff+7F;XpD6%Bt9$cSqxYKT68P=w}8#zy*@&s<;^$~"
    "lk<lPo<$AY_s>7j#9eD6Q6f}75JE_kAWew5()RPg>bRr3lx$Sd@)6ni9~X2IjVVp0DL4GWBH1RHD-IX2QA&k+tZi"
    "~SbEAc6J>Iz<o6ns<{*X`1%2+1}(0KIf67d4-kdnN{X>j>>B?nSJ9YIC|B?YqMvL&3*GAHp?R>Aw3*p9Q)=0<A<3"
    "~e*l}W>tX"
)


@pytest.mark.parametrize("text", [REAL_ZIP, REAL_LEGACY], ids=["zip", "legacy"])
def test_reads_what_torch_wrote(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(zlib.decompress(base64.b85decode(text)))
    tensors = load_state_dict(path)
    assert {name: tensor.numpy().tolist() for name, tensor in tensors.items()} == {
        "weight": [[1.5], [-2.0]],
        "bias": [0.25, 4.0],
        "half": [[0.0, 0.25, 0.5], [0.75, 1.0, 1.25]],
        "turned": [[0.0, 0.75], [0.25, 1.0], [0.5, 1.25]],
        "part": [1.0, 1.25],
    }
    assert tensors["half"].dtype == "BF16"
    assert tensors["half"].storage().dtype == np.uint16
    assert tensors["turned"].shape == (3, 2)


@pytest.mark.parametrize("text", [REAL_ZIP, REAL_LEGACY], ids=["zip", "legacy"])
def test_every_truncation_is_refused(tmp_path: Path, text: str) -> None:
    data = zlib.decompress(base64.b85decode(text))
    path = tmp_path / "cut.pt"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ConversionError, match="cut.pt"):
            load_state_dict(path)


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """No flipped byte gives another exception than ConversionError."""
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pt"
    refused = 0
    for text in (REAL_ZIP, REAL_LEGACY):
        data = bytearray(zlib.decompress(base64.b85decode(text)))
        for position in rng.integers(0, len(data), 300):
            changed = bytearray(data)
            changed[position] = rng.integers(256)
            path.write_bytes(changed)
            try:
                for tensor in load_state_dict(path).values():
                    tensor.numpy()
            except ConversionError:
                refused += 1
    assert refused > 50


def test_a_ranking_is_a_list_of_ints(tmp_path: Path) -> None:
    ids = [5, 0, 151935, 70000]
    assert load_torch_file(Archive(ids).save(tmp_path / "freq_4.pt")) == ids
    tensor = load_torch_file(
        Archive(contiguous(np.array(ids, np.int64))).save(tmp_path / "freq_t.pt")
    )
    assert tensor.numpy().tolist() == ids
    assert np.asarray(tensor).dtype == np.int64


def test_plain_values(tmp_path: Path) -> None:
    value = {"a": [1, -2, 2**40, 1.5, True, False, None, "text"], "b": (1, (2, ())), "c": {}}
    assert load_torch_file(Archive(value).save(tmp_path / "plain.pt")) == value


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "int32", "uint8"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    array = np.arange(12, dtype=dtype).reshape(3, 4)
    path = Archive({"x": contiguous(array)}).save(tmp_path / "x.pt")
    found = load_state_dict(path)["x"].numpy()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_bool_and_bfloat16(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000, 0x7FC0], np.uint16)
    path = Archive({"b": contiguous(np.array([True, False])), "h": contiguous(bits)}).save(
        tmp_path / "x.pt"
    )
    tensors = load_state_dict(path)
    assert tensors["b"].numpy().tolist() == [True, False]
    np.testing.assert_array_equal(tensors["h"].numpy(), np.array([1, -2, np.nan], np.float32))


def test_views(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32)
    base = values.reshape(4, 6)
    views = {
        "turned": (Tensor(values, (6, 4), (1, 6)), base.T),
        "part": (Tensor(values, (2, 3), (12, 2), 7), base[1::2, 1::2]),
        "column": (Tensor(values, (4,), (6,), 5), base[:, 5]),
        "scalar": (Tensor(values, (), (), 9), base[1, 3]),
        "empty": (Tensor(values, (0, 5), (5, 1)), np.empty((0, 5))),
    }
    path = Archive({name: view for name, (view, _) in views.items()}).save(tmp_path / "v.pt")
    tensors = load_state_dict(path)
    for name, (_, expected) in views.items():
        assert tensors[name].shape == expected.shape
        np.testing.assert_array_equal(tensors[name].numpy(), expected)


@pytest.mark.parametrize(
    "view",
    [
        Tensor(np.zeros(8, np.float32), (9,), (1,)),
        Tensor(np.zeros(8, np.float32), (2, 4), (5, 1)),
        Tensor(np.zeros(8, np.float32), (4,), (1,), 5),
        Tensor(np.zeros(8, np.float32), (10**12,), (0,)),  # would ask for 4 TB
        Tensor(np.zeros(8, np.float32), (2,), (2**61,)),
    ],
    ids=["long", "strided", "offset", "repeated", "overflow"],
)
def test_views_out_of_bounds_are_refused(tmp_path: Path, view: Tensor) -> None:
    path = Archive({"x": view}).save(tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="within its storage of 8 elements"):
        load_state_dict(path)


def test_a_storage_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    view = Tensor(np.zeros(8, np.float32), (100,), (1,), size=100)
    path = Archive({"x": view}).save(tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="expected 400 bytes.*found 32"):
        load_state_dict(path)


@pytest.mark.parametrize("number", [-1, True, 2.0, "1", None])
def test_sizes_must_be_counts(tmp_path: Path, number: object) -> None:
    path = Archive({"x": Tensor(np.zeros(4, np.float32), (number,), (1,))}).save(tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="described wrongly"):
        load_state_dict(path)


CALLS = {
    "posix.system": global_code("posix", "system") + b"(X\x04\x00\x00\x00exitt" + b"R",
    "builtins.eval": global_code("builtins", "eval") + b"(X\x01\x00\x00\x001tR",
    "builtins.getattr": global_code("builtins", "getattr"),
    "torch.load": global_code("torch", "load"),
    "torch._utils._rebuild_tensor": global_code("torch._utils", "_rebuild_tensor"),
    "collections.OrderedDict.__init__": global_code("collections", "OrderedDict.__init__"),
    "numpy._core.multiarray.scalar": global_code("numpy._core.multiarray", "scalar"),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_globals_are_refused_by_name(tmp_path: Path, name: str) -> None:
    nested = {"weights": [contiguous(np.zeros(2, np.float32)), (Raw(CALLS[name]),)]}
    path = Archive(nested).save(tmp_path / "evil.pt")
    with pytest.raises(ConversionError, match=f"evil.pt: refused: the pickle names {name};"):
        load_torch_file(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_call_does_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    program = pickle.dumps({"x": [Evil()]}, protocol=protocol)
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ConversionError, match=r"refused: the pickle names \w+.open"):
        load_torch_file(path)
    path.write_bytes(program)  # as a bare pickle, which the older format starts with
    with pytest.raises(ConversionError):
        load_torch_file(path)
    assert not marker.exists()
    pickle.loads(program)["x"][0].close()
    assert marker.exists(), "the pickle is not the attack it should be"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"i" + b"os\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"K\x01)\x81", "opcode NEWOBJ"),
        (b"Psome id\n", "opcode PERSID"),
        (b"\x8f", "opcode EMPTY_SET"),
        (global_code("collections", "OrderedDict") + b"}b", "expected a dict"),
        (global_code("torch", "FloatStorage") + b")R", "a call of torch.FloatStorage"),
        (b"X\x01\x00\x00\x00a)R", "a call of a str"),
        (b"](K\x01tR", "damaged"),
        (b"}((K\x01tK\x01u", "a dict's key is a tuple"),
        (b"h\x09", "damaged"),
        (b"K\x01Q", "no storage"),
        (b"0000", "opcode POP"),
    ],
)
def test_other_opcodes_are_refused(tmp_path: Path, code: bytes, message: str) -> None:
    path = Archive([Raw(code)]).save(tmp_path / "odd.pt")
    with pytest.raises(ConversionError, match=message):
        load_torch_file(path)


def test_nothing_is_unpacked_from_compressed_entries(tmp_path: Path) -> None:
    """Torch stores its entries as they are; a compressed one may be a bomb."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]." + b"\0" * 10_000_000)
    with pytest.raises(ConversionError, match="uncompressed"):
        load_torch_file(path)


def test_big_endian_and_missing_storages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    archive = Archive({"x": contiguous(np.zeros(2, np.float32))})
    for order, message in (("big", "big-endian"), ("little", "storage 0 is missing")):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", archive.pickle())
            file.writestr("archive/byteorder", order)
        with pytest.raises(ConversionError, match=message):
            load_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found another format"),
        (pickle.dumps([1, 2], protocol=2), "found a plain pickle"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        load_torch_file(path)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("readme", content)
    path.write_bytes(zipped.getvalue())
    with pytest.raises(ConversionError, match="no data.pkl"):
        load_torch_file(path)


def test_state_dict_shapes(tmp_path: Path) -> None:
    weights = {"w": contiguous(np.ones(3, np.float32))}
    path = Archive({"state_dict": weights, "epoch": 3}).save(tmp_path / "x.pt")
    assert load_state_dict(path)["w"].numpy().tolist() == [1, 1, 1]
    for value, message in (
        ([1], "found list"),
        ({}, "without entries"),
        ({**weights, "epoch": 3}, "found int under 'epoch'"),
    ):
        with pytest.raises(ConversionError, match=message):
            load_state_dict(Archive(value).save(tmp_path / "y.pt"))


def test_a_legacy_storage_shorter_than_stated_is_refused(tmp_path: Path) -> None:
    data = zlib.decompress(base64.b85decode(REAL_LEGACY))
    size = struct.pack("<q", 6)
    position = data.rindex(size)
    path = tmp_path / "x.pt"
    path.write_bytes(data[:position] + struct.pack("<q", 60) + data[position + 8 :])
    with pytest.raises(ConversionError, match="expected its size 6"):
        load_state_dict(path)
