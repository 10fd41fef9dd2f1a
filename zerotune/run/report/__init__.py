"""In: the folder that a run leaves. Out: report.html, a page to look at, and pictures of its charts.

history.py reads the files, curves.py says which charts a run has, charts.py draws them as SVG and pictures.py as PNG, markup.py
holds what pages are made of, page.py the page itself. Nothing here looks at a model or an engine.
"""
