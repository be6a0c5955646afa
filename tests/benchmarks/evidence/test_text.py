"""How packages become documents: archives, downloads, text of pages, doubles, and what is taken of too much."""

import gzip
import hashlib
import io
import json
import lzma
import random
import tarfile
import zipfile

import pytest

from benchmarks.evidence import gather
from benchmarks.evidence.archives import members
from benchmarks.evidence.doubles import Novelty, Seen
from benchmarks.evidence.downloads import DownloadError, download
from benchmarks.evidence.packages import PACKAGES, Package
from benchmarks.evidence.texts import documents

FILES = {
    "usr/share/doc/a.txt": b"first",
    "usr/share/doc/b.txt.gz": gzip.compress(b"second"),
    "usr/share/c.png": b"\x89",
}


def write_deb(path, files, compression="xz"):
    """With a part before the files of an odd number of bytes, as `ar` pads it, and a link among them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/share/doc/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)
    parts = {"debian-binary": b"2.0", f"data.tar.{compression}": data.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))


def package(**changes):
    settings = {"name": "a", "version": "1", "file": "pool/a.deb", "sha256": "", "licence": "MIT", "kind": "markup"}
    return Package(**settings | {"members": ("usr/share/doc/*",)} | changes)


class TestArchives:
    @pytest.mark.parametrize("compression", ["xz", "gz"])
    def test_files_of_a_debian_package(self, tmp_path, compression):
        write_deb(tmp_path / "a.deb", FILES, compression)
        found = dict(members(tmp_path / "a.deb"))
        assert found == FILES | {"usr/share/doc/b.txt.gz": b"second"}

    def test_files_of_a_wheel(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
            wheel.writestr("b.py", "b")
            wheel.writestr("a/", "")
            wheel.writestr("a/a.py", "a")
        assert list(members(tmp_path / "a.whl")) == [("a/a.py", b"a"), ("b.py", b"b")]

    @pytest.mark.parametrize("content", [b"no archive", b"!<arch>\n", b""])
    def test_what_is_none(self, tmp_path, content):
        (tmp_path / "a.deb").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.deb is "):
            list(members(tmp_path / "a.deb"))


class TestDownloads:
    def test_a_package_is_fetched_once_from_the_mirror(self, tmp_path):
        mirror = tmp_path / "mirror"
        (mirror / "pool").mkdir(parents=True)
        write_deb(mirror / "pool" / "a.deb", FILES)
        wanted = package(sha256=hashlib.sha256((mirror / "pool" / "a.deb").read_bytes()).hexdigest())
        path = download(wanted, tmp_path / "downloads", mirror.as_uri())
        (mirror / "pool" / "a.deb").unlink()
        assert download(wanted, tmp_path / "downloads", mirror.as_uri()) == path
        assert len(dict(members(path))) == 3

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "a.deb").write_bytes(b"of another version")
        with pytest.raises(DownloadError, match=r"is not the recorded file: its sha256 is .*; delete it"):
            download(package(sha256="0" * 64), tmp_path)

    def test_where_no_mirror_has_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr("benchmarks.evidence.downloads.DEBIAN_SNAPSHOT", (tmp_path / "b").as_uri())
        with pytest.raises(DownloadError, match=r"no mirror has pool/a\.deb: file:.*/a: .*; file:.*/b: "):
            download(package(), tmp_path / "downloads", (tmp_path / "a").as_uri())
        assert list((tmp_path / "downloads").glob("*.deb")) == []

    def test_what_is_recorded(self):
        for wanted in PACKAGES:
            assert len(bytes.fromhex(wanted.sha256)) == 32
            assert wanted.version in wanted.file
            assert wanted.members and wanted.licence
        assert len({wanted.name for wanted in PACKAGES}) == len(PACKAGES)


class TestDocuments:
    def test_a_page_without_what_leads_elsewhere(self):
        page = b"""<html><head><title>t</title><script>x()</script></head><body><div class="navheader">Next</div>
          <div id="content"><h1>Loops</h1><p>A <em>loop</em> runs.</p><nav>Up</nav><p>It ends.</p></div>
          <footer>2026</footer></body></html>"""
        (text,) = documents("page", page, None)
        assert [line.strip() for line in text.splitlines() if line.strip()] == ["Loops", "A loop runs.", "It ends."]
        (part,) = documents("page", b"<body><p>no</p><main>yes</main></body>", "//main")
        assert part.strip() == "yes"
        assert list(documents("page", b"", None)) == list(documents("page", b"<body></body>", "//main")) == []

    def test_entries_are_joined(self):
        entries = [f"Word{n} \\Word\\, n.\n   What it means, {n}.\n\n      A quotation.\n" for n in range(200)]
        found = list(documents("dictionary", "\n".join(entries).encode(), None))
        assert len(found) > 1
        assert all(text.startswith("Word") and len(text) > 3900 for text in found[:-1])
        assert "\n\n".join(found).count("A quotation.") == 200

    def test_lines_are_tidied(self):
        assert list(documents("python", b"a  \n\n\n\n\n\nb\t\n\n", None)) == ["a\n\n\nb"]

    def test_stray_bytes(self):
        assert list(documents("markup", b"a" * 50_000 + b"\x92", None)) == ["a" * 50_000 + "\ufffd"]
        assert list(documents("markup", b"a\xff\xfeb" * 10, None)) == []


def words(seed, count=400):
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(count)]


class TestDoubles:
    def test_equal_and_nearly_equal_texts(self):
        seen, text = Seen(), words(0)
        changed = [*text[:200], "another", *text[201:]]  # 5 of 396 runs of five words
        half = [*text[:200], *words(1, 200)]
        assert seen.add(" ".join(text)) is Novelty.NEW
        assert seen.add("\n".join(text)) is Novelty.DOUBLE
        assert seen.add(" ".join(changed)) is Novelty.NEAR_DOUBLE
        assert seen.add(" ".join(half)) is Novelty.NEW
        assert seen.add(" ".join(words(2))) is Novelty.NEW

    def test_texts_of_a_few_words(self):
        seen = Seen()
        assert [seen.add(text) for text in ("a", "a b", "a")] == [Novelty.NEW, Novelty.NEW, Novelty.DOUBLE]


class TestGather:
    def test_what_is_written(self, tmp_path):
        text = " ".join(words(0))
        sources = [(package(), [text, "short", text]), (package(name="b"), [" ".join(words(1)), text + " more"])]
        shares, digest = gather.gather(iter(sources), tmp_path / "out.xz")
        first, second = shares
        assert (first.documents, first.characters, first.short, first.doubles) == (1, len(text), 1, 1)
        assert (second.documents, second.near_doubles) == (1, 1)
        lines = lzma.decompress((tmp_path / "out.xz").read_bytes())
        assert hashlib.sha256(lines).hexdigest() == digest
        assert [json.loads(line)["package"] for line in lines.splitlines()] == ["a", "b"]
        assert f"| b | 1 | MIT | 1 | {second.characters:,} | 50" in gather.table(shares)

    def test_of_too_much_the_same_documents_are_taken(self):
        texts = {f"usr/share/doc/{n}.txt": f"{n} ".encode() * 100 for n in range(10, 30)}
        every = gather.texts_of(package(), iter(texts.items()))
        some = gather.texts_of(package(most_characters=1500), iter(texts.items()))
        assert len(every) == 20 and 4 <= len(some) <= 5
        assert some == [text for text in every if text in some]
        assert sorted(some) == sorted(gather.texts_of(package(most_characters=1500), reversed(texts.items())))

    def test_members_are_chosen_by_pattern(self):
        chosen = package(members=("*.txt", "*.md"), without=("*/of_others/*",))
        files = {"a/b.txt": b"1", "a/b.png": b"2", "c.md": b"3", "a/of_others/d.txt": b"4"}
        assert gather.texts_of(chosen, iter(files.items())) == ["1", "3"]
