"""Pages that tell what was found: one HTML file without network, with headings, tables, line charts and heat maps.

    page = Page("A sweep", "Which rank and learning rate did best.")
    page.section("Loss")
    chart = line_chart({"rank 4": [(1, 2.0), (2, 1.5)]}, title="Validation loss", x="step", y="loss")
    page.figure("Validation loss", chart, "Lower is better.")
    page.table(["rank", "loss"], [["4", "1.5"]], "The end of each run.")
    path.write_text(page.html(), encoding="utf-8")

Charts are SVG inside of the page, drawn here, without a script. The colours follow the reader's light or dark setting,
a keyboard reaches all that scrolls or opens, and each chart has a text that says what it shows.
"""

from lightning_lora.page.charts import Bar, Cell, Point, heat_map, line_chart
from lightning_lora.page.document import Page
from lightning_lora.page.numbers import number, written

__all__ = ["Bar", "Cell", "Page", "Point", "heat_map", "line_chart", "number", "written"]
