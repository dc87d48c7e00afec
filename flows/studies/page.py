"""study.html"""

from flows.studies.analysis import Analysis


def render_page(analysis: Analysis) -> str:
    return "x"
