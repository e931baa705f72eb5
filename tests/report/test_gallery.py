"""The page of generated documents."""

from html.parser import HTMLParser

from megatron_mm.report.gallery import gallery


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.words, self.pictures = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        assert tag != "script", "text became markup"
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.words.append(data)


def test_text_stays_text_and_pictures_keep_their_order(tmp_path):
    nasty = "<script>alert('&amp;')</script>"
    lines = [
        {
            "prompt": [{"text": nasty}],
            "sample": 0,
            "segments": [{"image": "a"}, {"text": nasty}, {"image": "b"}],
        },
        {"prompt": [{"image": str(tmp_path / "x.jpg")}], "sample": 1, "segments": [{"text": ""}]},
    ]
    (tmp_path / "x.jpg").write_bytes(b"abc")
    read = Reader(gallery("Title", lines))
    assert read.pictures == ["a", "b", "data:image/jpeg;base64,YWJj"]
    assert sum(nasty in word for word in read.words) == 2
