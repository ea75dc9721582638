"""Cases of the metrics of `casa eval`, and what lmms-eval says of each. Run in its environment, it writes the table:

python tests/support/eval_metric_cases.py tests/evaluation/metric_cases.json
"""

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path

# Between bars.
ANSWERS = (
    "| |.|...|5|5.0|5.|05|5%|5 %|0.05|%|%%|5.25|5.26|4.75|4.74|-5|+5|1e3|1,000|1000|1_000|nan|inf|-inf|0|0.0|0%"
    "|\u0661\u0662|\u00bd|\u4e94|yes|Yes.|NO|no, it is not|y|N|n.|maybe|not yes|know|eyes| yes |yes\n|A|B.|(B)|B) cat"
    "|B. cat| C. dog|b. cat|The answer is B.|Answer: B. cat|Answer: B|AB.|cat|The cat|a cat|Cat|cat.|cat..|cat . .|cats"
    "|a  cat|CAT\tdog|cat\ndog|it's|its|dont|don't|dont.|couldnt've|shouldn'tve|somebody'd|two|none|ten cats|cat-dog"
    "|cat - dog|cat/dog|3,5|3.5|$ 3.50|3.50 $|what?|(cat)|[cat] dog|Kino \u2163|\uff43\uff41\uff54"
    "|\uff23\uff21\uff34\u3000\uff15"
    "|\u00e9|e\u0301|stra\u00dfe|STRASSE|\\frac{1}{2}|\\FRAC{1}{2}|\\frac {1} {2}|x ^ 2|cat dog bird|dog|a|the|an"
    "|Paris, France|paris france|2019-04-01|04/01/2019|" + "." * 40 + "|\u0130|\u00df|\U0001f600"
    "|\u00a0cat\u00a0"
).split("|")
WORDS = "cat Dog 5 5.0 the two it's - % . , ? B. \uff43 \u00e9 \n dont 12 ( )".split(" ")
REFERENCES = (
    "5|5.0|5%|0.05|0|0.0|1000|-5|nan|inf"
    "|cat|Cat|yes|No|B|C|12|\u00bd||3.5|3,5|don't|2|cat dog|stra\u00dfe|\u00e9|CAT 5"
    "|\\frac{1}{2}|x^2|Paris, France|2019-04-01|cat.|\u0130|\U0001f600| cat "
).split("|")
# Of so many cases one is in the table, and all of the metrics that few answers satisfy; where lmms-eval is, all are
# compared.
FROZEN, FROZEN_WHOLE = 5, ("ai2d", "mme")
OPTIONS = ["none", "cat", "dog", "bird"]


def cases():
    """Return cases: metric, answer, and what it is compared with."""
    drawn = random.Random(2013)
    answers = [*ANSWERS, *(" ".join(drawn.choices(WORDS, k=drawn.randint(1, 4))) for _ in range(60))]
    found = []
    for answer in answers:
        for right in (*drawn.sample(REFERENCES, 4), answer.swapcase(), answer.strip(" .") or "5"):
            found.append(("chartqa", answer, {"answer": right, "type": "human_test"}))
            found.append(("realworldqa", answer, {"answer": right}))
            found.append(("gqa", answer, {"answer": right}))
        for _ in range(4):
            people = drawn.choices([answer, *drawn.sample(REFERENCES, 4)], k=10)
            found.append(("textvqa", answer, {"answers": people, "question_id": 0}))
            few = drawn.choices([*REFERENCES, answer], k=drawn.randint(1, 3))
            found.append(("docvqa", answer, {"answers": few}))
            kind = {"dataset": drawn.choice(("IIIT5K", "HME100k")), "question_type": "Regular Text Recognition"}
            found.append(("ocrbench", answer, {"answer": few, **kind}))
        for number in range(4):
            found.append(("ai2d", answer, {"answer": str(number), "options": OPTIONS, "question": "What?"}))
        for right in ("Yes", "no."):
            found.append(("mme", answer, {"answer": right, "category": "OCR", "question_id": "1"}))
    for size in (1, 2, 3, 4, 5):
        found.append(("textvqa", "cat", {"answers": ["cat"] * size, "question_id": 0}))
    return found


def lmms_score(metric, answer, fields):
    """Return lmms-eval's score of a case; before it, Kyutai's script does to the answer what its protocol says."""
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter, ai2d_doc_to_target
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results
    from lmms_eval.tasks.mme.utils import mme_process_results
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.realworldqa.utils import realworldqa_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    fields = json.loads(json.dumps(fields))  # Some of these change what they are given.
    without_period = answer.rstrip(".")
    if metric == "chartqa":
        return chartqa_process_results(fields, [without_period])["relaxed_overall"]
    if metric == "realworldqa":
        if fields["answer"].strip().upper() in ("A", "B", "C", "D"):
            return None  # Since April 2026 a letter is looked for in the answer, which was not so when Kyutai measured.
        return realworldqa_process_results(fields, [without_period])["exact_match"]
    if metric == "gqa":
        if any(words != words.strip() or len(words) != len(words.lower()) for words in (answer, fields["answer"])):
            return None  # Kyutai's script strips first, and numpy cuts what is longer in lower case.
        given = {"predictions": [answer], "references": [fields["answer"]]}
        return float(exact_match_hf_evaluate(**given, ignore_case=True, ignore_punctuation=True)["exact_match"])
    if metric == "textvqa":
        return textvqa_process_results(fields, [answer])["exact_match"]
    if metric == "docvqa":
        said = without_period.strip()
        compared = (said, *fields["answers"])
        if any(words != " ".join(words.split()) or len(words) != len(words.upper()) for words in compared):
            return None  # lmms-eval divides by the length in capitals, with the blanks that the distance leaves out.
        return anls(fields["answers"], [said])["anls"]
    if metric == "ocrbench":
        return ocrbench_process_results(fields, [without_period])["ocrbench_accuracy"]["score"]
    if metric == "ai2d":
        chosen = MultiChoiceRegexFilter(regex_pattern="([A-Z])\\.", group_select=0)
        (letter,) = chosen.apply([[answer.removeprefix("Answer: ")]], [fields])
        return float(letter == ai2d_doc_to_target(fields, "mcq"))
    return mme_process_results(fields, [answer])["mme_perception_score"]["score"]


def write(path):
    """Write the table: of the cases that lmms-eval scores, one in so many."""
    lines = []
    for number, (metric, answer, fields) in enumerate(cases()):
        if number % FROZEN and metric not in FROZEN_WHOLE:
            continue
        score = lmms_score(metric, answer, fields)
        if score is not None:
            lines.append(json.dumps([metric, answer, fields, round(float(score), 9)]))
    head = json.dumps({"made by": f"lmms-eval {version('lmms-eval')}"})
    Path(path).write_text("[" + ",\n".join([head, *lines]) + "]\n")


if __name__ == "__main__":
    write(sys.argv[1])
