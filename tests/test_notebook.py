"""A report as notebooks show it."""

from html.parser import HTMLParser

from test_report import full

from onnxq.notebook import summary_html
from onnxq.report import Latency, LayerRecord, Report


def test_it_says_what_matters_and_nothing_runs() -> None:
    report = full()
    report.float_bytes, report.quantized_bytes = 4000, 1000
    report.quantized_latency = Latency(1.0, 0.9, 1.1)
    report.warnings = ["5 < 6 & so on"]
    text = summary_html(report)
    for part in ("4.00× smaller", "2.00× faster", "0.9900", "5 &lt; 6 &amp; so on", "<td>b</td>"):
        assert part in text
    assert "<script" not in text
    assert len(text) < 4000


def test_names_are_text_and_every_element_is_closed() -> None:
    name = "<script>alert(1)</script>"
    layer = LayerRecord(name, "Conv", "w s8", sqnr_db=1.0, contribution=0.5)
    text = summary_html(Report(model=name, preset="p", layers=[layer], warnings=[name]))
    assert "<script" not in text
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "br":
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(text)
    assert open_tags == []
