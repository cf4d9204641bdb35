"""A nested system as a table, a picture and an interactive page.

groups: memories that are shown as one.  table: text.  shapes, layout, routes: where everything stands in the picture.
figure: the picture as SVG, PNG or PDF.  page: HTML.
"""
