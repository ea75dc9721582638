"""What a token costs the page, counted and not timed: as much after thousands of captions as after a few."""

import pytest

NUM_TOKENS = 20
# Binary searches among 30 times as many captions take 5 steps more each.
MAX_MORE_A_TOKEN = 20

FILL = """async (numCaptions) => {
    const { Screen } = await import("/web/screen.js");
    const { Transcript } = await import("/web/transcript.js");
    const screen = new Screen(document, () => undefined);
    const transcript = new Transcript();
    screen.begin(transcript, null);
    window.say = (frame, numTokens) => {
        const at = { frame, timestamp: frame / 2 };
        for (let index = 0; index < numTokens; index += 1) {
            screen.entry(transcript.captionDelta({ ...at, text: `${index} ` }));
        }
        screen.entry(transcript.captionDone({ ...at, caption: "done" }));
        screen.entry(transcript.captionDone({ ...at, frame: frame + 0.5, caption: "" }));
    };
    window.answer = (id, numTokens) => {
        screen.entry(transcript.question(id, 0, "Is it?"));
        for (let index = 0; index < numTokens; index += 1) {
            screen.entry(transcript.answerDelta({ id, text: "yes " }));
        }
        screen.entry(transcript.answerDone({ id, text: "yes" }));
    };
    for (let frame = 0; frame < numCaptions; frame += 1) say(frame, 1);
}"""


class Counter:
    """Counts what a page does: blocks of its own JavaScript, and layouts."""

    def __init__(self, page):
        self.page, self.devtools = page, page.context.new_cdp_session(page)
        self.devtools.send("Profiler.enable")
        self.devtools.send("Performance.enable")

    def count(self, script):
        """Return how often blocks were entered, and how often the page was laid out, during a script."""
        before = self._layouts()
        self.devtools.send("Profiler.startPreciseCoverage", {"callCount": True, "detailed": True})
        self.page.evaluate(script)
        result = self.devtools.send("Profiler.takePreciseCoverage")["result"]
        self.devtools.send("Profiler.stopPreciseCoverage")
        ranges = (
            part
            for script in result
            if "/web/" in script["url"]
            for function in script["functions"]
            for part in function["ranges"]
        )
        return sum(part["count"] for part in ranges), self._layouts() - before

    def _layouts(self):
        metrics = self.devtools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "LayoutCount")


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["say", "answer"])
def test_the_work_of_a_token_does_not_grow_with_the_captions(open_page, kind):
    work = []
    for num_captions in (100, 3000):
        with open_page() as page:
            page.evaluate(FILL, num_captions)
            blocks, layouts = Counter(page).count(f"{kind}({num_captions}, {NUM_TOKENS})")
            work.append(blocks)
            assert layouts <= 3
    assert work[0] > NUM_TOKENS
    assert work[1] - work[0] <= MAX_MORE_A_TOKEN * NUM_TOKENS, work
