"""The page of a comparison: what is marked, and that text is never markup."""

from zoft.compare.page import PictureSection, TableSection, page

HEAD = ["model", "task", "method", "lr", "loss"]
LINES = [["m", "rte", "mezo", "0.001 edge", "0.5"], ["m", "rte", "adam", "0.1", "0.4"], ["m", "boolq", "a&b", "1", "1"]]


def test_best_scores_edges_and_places_are_marked() -> None:
    found = page("t", "s", [TableSection("Scores", "below", (HEAD, LINES), {(1, "loss")})], [], [], "")
    lines = [line for line in found.splitlines() if line.startswith("<tr")]
    assert lines == [
        '<tr><th class="text">model</th><th class="text">task</th><th class="text">method</th>'
        "<th>lr</th><th>loss</th></tr>",
        '<tr class="first"><td class="text">m</td><td class="text">rte</td><td class="text">mezo</td>'
        '<td class="edge">0.001 edge</td><td>0.5</td></tr>',
        '<tr><td class="text">m</td><td class="text">rte</td><td class="text">adam</td><td>0.1</td>'
        '<td class="best">0.4</td></tr>',
        '<tr class="first"><td class="text">m</td><td class="text">boolq</td><td class="text">a&amp;b</td><td>1</td>'
        "<td>1</td></tr>",
    ]


def test_text_is_never_markup() -> None:
    bad = "<script>alert('x')</script>"
    table, picture = TableSection(bad, bad, ([bad], [[bad]])), PictureSection(bad, bad, "<svg/>")
    found = page(bad, bad, [table], [picture], [bad], bad)
    assert "<script" not in found and found.count("&lt;script&gt;") == 12
    assert 'src="data:image/svg+xml;base64,PHN2Zy8+"' in found
