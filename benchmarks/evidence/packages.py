"""What the text is gathered from: packages of Debian 12 and of the Python Package Index, by version and digest.

A package's text is that of some of its files. Its licence is the package's own; none of its text is part of this
project.
"""

import dataclasses
from typing import Literal

Kind = Literal["markup", "page", "dictionary", "python"]  # `texts.READERS`


@dataclasses.dataclass(frozen=True)
class Package:
    """Files of a package whose text is gathered."""

    name: str
    version: str
    file: str  # what is downloaded: a path below a Debian mirror, or a wheel's name
    sha256: str
    licence: str  # as the package states it
    kind: Kind
    members: tuple[str, ...]  # glob patterns of paths inside, any of which is enough
    without: tuple[str, ...] = ()  # of paths that are left out all the same
    most_characters: int | None = None  # of what is gathered; documents are taken in the order of their digests
    content: str | None = None  # of pages: XPath of the part that is text; None: the whole body

    @property
    def is_wheel(self) -> bool:
        """Whether it is of the Python Package Index."""
        return self.file.endswith(".whl")


_GENERATED = ("*/locale/*", "*_pb2.py", "*/unicode_data.py")  # by programs

DEBIAN = (
    Package(
        "dict-gcide",
        "0.48.5+nmu2",
        "pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "GPL-2.0-or-later",
        "dictionary",
        ("usr/share/dictd/gcide.dict.dz",),
        most_characters=20_000_000,
    ),
    Package(
        "linux-doc-6.1",
        "6.1.176-1",
        "pool/main/l/linux/linux-doc-6.1_6.1.176-1_all.deb",
        "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
        "GPL-2.0",
        "markup",
        ("usr/share/doc/linux-doc-6.1/html/_sources/*.txt",),
        without=("*/translations/*",),
    ),
    Package(
        "anarchism",
        "15.3-3",
        "pool/main/a/anarchism/anarchism_15.3-3_all.deb",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "GPL-2.0",
        "markup",
        ("usr/share/doc/anarchism/markdown/*.md*",),
    ),
    Package(
        "python3.11-doc",
        "3.11.2-6+deb12u8",
        "pool/main/p/python3.11/python3.11-doc_3.11.2-6+deb12u8_all.deb",
        "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        "PSF-2.0",
        "markup",
        ("usr/share/doc/python3.11/html/_sources/*.txt",),
    ),
    Package(
        "perl-doc",
        "5.36.0-7+deb12u3",
        "pool/main/p/perl/perl-doc_5.36.0-7+deb12u3_all.deb",
        "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591",
        "GPL-1.0-or-later or Artistic-1.0-Perl",
        "markup",
        ("usr/share/perl/*/pod/*.pod",),
    ),
    Package(
        "debian-policy",
        "4.6.2.0",
        "pool/main/d/debian-policy/debian-policy_4.6.2.0_all.deb",
        "ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39",
        "GPL-2.0-or-later",
        "markup",
        ("usr/share/doc/debian-policy/policy.html/_sources/*.txt",),
    ),
    Package(
        "debian-handbook",
        "11.20220922",
        "pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        "GPL-2.0-or-later or CC-BY-SA-3.0",
        "page",
        ("usr/share/doc/debian-handbook/html/en-US/*.html",),
    ),
    Package(
        "cppreference-doc-en-html",
        "20170409-2",
        "pool/main/c/cppreference-doc/cppreference-doc-en-html_20170409-2_all.deb",
        "603e9b7ef33d08b957e287b2b1f429f2338bccf75144f91b7c9e51d3cb6a14e2",
        "CC-BY-SA-3.0 or GFDL-1.3",
        "page",
        ("usr/share/cppreference/doc/html/en/*.html",),
        content="//div[@id='mw-content-text']",
    ),
    Package(
        "postgresql-doc-15",
        "15.18-0+deb12u1",
        "pool/main/p/postgresql-15/postgresql-doc-15_15.18-0+deb12u1_all.deb",
        "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0",
        "PostgreSQL",
        "page",
        ("usr/share/doc/postgresql-doc-15/html/*.html",),
    ),
    Package(
        "sqlite3-doc",
        "3.40.1-2+deb12u2",
        "pool/main/s/sqlite3/sqlite3-doc_3.40.1-2+deb12u2_all.deb",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
        "public domain",
        "page",
        ("usr/share/doc/sqlite3/*.html",),
        without=("*/search.d/*",),
    ),
    Package(
        "rust-doc",
        "1.63.0+dfsg1-2",
        "pool/main/r/rustc/rust-doc_1.63.0+dfsg1-2_all.deb",
        "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b",
        "MIT or Apache-2.0",
        "page",
        (
            "usr/share/doc/rust-doc/html/book/*.html",
            "usr/share/doc/rust-doc/html/cargo/*.html",
            "usr/share/doc/rust-doc/html/edition-guide/*.html",
            "usr/share/doc/rust-doc/html/embedded-book/*.html",
            "usr/share/doc/rust-doc/html/nomicon/*.html",
            "usr/share/doc/rust-doc/html/reference/*.html",
            "usr/share/doc/rust-doc/html/rust-by-example/*.html",
            "usr/share/doc/rust-doc/html/rustc/*.html",
            "usr/share/doc/rust-doc/html/rustdoc/*.html",
        ),
        without=("*/print.html", "*/theme/*"),
        content="//main",
    ),
    Package(
        "octave-doc",
        "7.3.0-2",
        "pool/main/o/octave/octave-doc_7.3.0-2_all.deb",
        "b27897cc7e3d688daa5cb8f8d1ea47077f3fbd205ce32e22522200ff0c1eadd5",
        "GPL-3.0-or-later",
        "page",
        ("usr/share/doc/octave/*.html",),
    ),
    Package(
        "maxima-doc",
        "5.46.0-11",
        "pool/main/m/maxima/maxima-doc_5.46.0-11_all.deb",
        "01a726b693a7e465a62040ac5ade4762194d7553524231d77cd1fcd4a69a75b9",
        "GPL-2.0-or-later",
        "page",
        ("usr/share/doc/maxima-doc/html/*.html",),
    ),
)

_WHEELS = (
    (
        "dask",
        "2026.8.0",
        "dask-2026.8.0-py3-none-any.whl",
        "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
        "BSD-3-Clause",
    ),
    (
        "diffusers",
        "0.42.1",
        "diffusers-0.42.1-py3-none-any.whl",
        "9154faa704ce00e0b77f568e0d64786064368528aab5fc14eeea92f87d788014",
        "Apache-2.0",
    ),
    (
        "django",
        "6.1.3",
        "django-6.1.3-py3-none-any.whl",
        "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
        "BSD-3-Clause",
    ),
    (
        "hypothesis",
        "6.155.7",
        "hypothesis-6.155.7-py3-none-any.whl",
        "9f634bdb1f9e9b8ab6ba09431cf2deedb750c96978125a6fb3c5a0f6c6db4131",
        "MPL-2.0",
    ),
    (
        "jax",
        "0.12.0.1",
        "jax-0.12.0.1-py3-none-any.whl",
        "e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae",
        "Apache-2.0",
    ),
    (
        "keras",
        "3.15.1",
        "keras-3.15.1-py3-none-any.whl",
        "836460e480930acbd19bb7a17e62f9ecad40e8a9af9a651fc8d0586a96d27e20",
        "Apache-2.0",
    ),
    (
        "mypy",
        "2.4.1",
        "mypy-2.4.1-py3-none-any.whl",
        "1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999",
        "MIT",
    ),
    (
        "networkx",
        "3.7",
        "networkx-3.7-py3-none-any.whl",
        "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
        "BSD-3-Clause",
    ),
    (
        "nltk",
        "3.10.4",
        "nltk-3.10.4-py3-none-any.whl",
        "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
        "Apache-2.0",
    ),
    (
        "sphinx",
        "9.1.1",
        "sphinx-9.1.1-py3-none-any.whl",
        "f8b60013ce25017be41a509e5c2d265bc1918410061315c36b809c7f335646c0",
        "BSD-2-Clause",
    ),
    (
        "sqlalchemy",
        "2.1.9",
        "sqlalchemy-2.1.9-py3-none-any.whl",
        "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
        "MIT",
    ),
    (
        "sympy",
        "1.14.0",
        "sympy-1.14.0-py3-none-any.whl",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "BSD-3-Clause",
    ),
    (
        "tensorflow_probability",
        "0.25.0",
        "tensorflow_probability-0.25.0-py2.py3-none-any.whl",
        "f3f4d6431656c0122906888afe1b67b4400e82bd7f254b45b92e6c5b84ea8e3e",
        "Apache-2.0",
    ),
    (
        "transformers",
        "5.24.0",
        "transformers-5.24.0-py3-none-any.whl",
        "ff5ebedf9359f94bb63772b6380eba6e7104d010cbbb2cb82c788817ea7486f6",
        "Apache-2.0",
    ),
    (
        "twisted",
        "26.10.0",
        "twisted-26.10.0-py3-none-any.whl",
        "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
        "MIT",
    ),
    (
        "xarray",
        "2026.9.0",
        "xarray-2026.9.0-py3-none-any.whl",
        "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
        "Apache-2.0",
    ),
)

PACKAGES = (
    *DEBIAN,
    *(Package(*wheel, "python", ("*.py",), _GENERATED, most_characters=8_000_000) for wheel in _WHEELS),
)
