"""axe-core in a page, and the rules of WCAG that it does not judge."""

from importlib.resources import files

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
RUN = "(tags) => axe.run(document, { runOnly: tags, resultTypes: ['violations', 'incomplete'] })"
TARGET_PX = 44
# What can be pressed or filled in, and is in sight. The browser's own controls of a video are its own matter.
SMALL_TARGETS = """(least) => [...document.querySelectorAll("button, input, select, textarea, summary, a[href]")]
    .filter((node) => node.checkVisibility() && node.type !== "file")
    .map((node) => [node.id || node.name || node.textContent.trim(), node.getBoundingClientRect()])
    .filter(([, box]) => box.width < least || box.height < least)
    .map(([name, box]) => `${name}: ${box.width} x ${box.height}`)"""


def axe_report(page):
    """Return axe's violations, and the rules on which it leaves something to people."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    result = page.evaluate(RUN, TAGS)
    found = [
        f"{rule['id']}: {node['html'][:120]} {node['failureSummary']}"
        for rule in result["violations"]
        for node in rule["nodes"]
    ]
    return found, [rule["id"] for rule in result["incomplete"]]


def small_targets(page):
    """Return what is smaller than a fingertip, `name: width x height`."""
    return page.evaluate(SMALL_TARGETS, TARGET_PX)


def overflow_px(page):
    """Return by how much the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
