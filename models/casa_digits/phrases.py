"""The phrases of casa-tiny-digits: its questions, and its answers besides digits."""

READ = (
    "Read the digits.",
    "Read the digits",
    "Please read the digits.",
    "What digits do you see?",
    "Which digits are in the image?",
    "What are the digits?",
    "Read the image.",
    "What do you see?",
)
COUNT = (
    "How many digits are there?",
    "How many digits do you see?",
    "How many digits are in the image?",
    "Count the digits.",
    "How many?",
)
FIRST = (
    "What did you read first?",
    "Which digits did you read first?",
    "What was the first thing you read?",
    "What did you say first?",
)
LAST = (
    "What did you read last?",
    "Which digits did you read last?",
    "What was the last thing you read?",
    "What did you say last?",
)
BEFORE = (
    "What did you read before that?",
    "Which digits did you read before that?",
    "What did you say before that?",
    "And before that?",
)
CHANGES = (
    "How often did it change?",
    "How often did the digits change?",
    "How many times did it change?",
    "How many changes were there?",
)
READ_JSON = ("Read the digits as JSON.", "Read the digits. Answer as JSON.", "Return the digits as JSON.")
COUNT_JSON = ("Count the digits as JSON.", "Count the digits. Answer as JSON.", "Return the number of digits as JSON.")
REPORT = ("Report the digits.", "Report what you see.", "Call the tool.", "Use the tool.", "Extract the digits.")
NO_IMAGE = "There is no image yet."
NOTHING = "Nothing."
MANY = "More than 9."
SYSTEM = (
    "You are a helpful assistant.",
    "You are an expert video commentator providing real-time factual and neutral commentary on visual content.",
    "You read handwritten digits.",
    "Answer briefly.",
)
WATCH = (
    "Please describe what you see in the video in real-time. Stick to the visual facts. ",
    "Please describe what you see in the video in real-time. Stick to the visual facts.",
    "Read the digits in the video whenever they change.",
    "Say the digits when they change.",
    "Caption the video live.",
    "Describe the video.",
    "Read the digits.",
)
SMALL_TALK = ("Hello!", "Hello", "Hi", "Who are you?", "What can you do?", "Thank you.", "Thanks!", "Good morning.")

# Names of fields whose integer is the number of digits; so it is for names that stand nowhere here.
COUNT_NAMES = ("count", "number_of_digits", "num_digits", "total", "number", "n", "length")
FIRST_NAMES = ("first", "first_digit", "digit")
LAST_NAMES = ("last", "last_digit")
LIST_NAMES = ("digits", "numbers", "values", "items", "elements", "response", "list")
TEXT_NAMES = ("text", "answer", "caption", "reading", "content", "value", "response")
OBJECT_NAMES = ("result", "image", "data", "output", "response", "reading")
TOOL_NAMES = ("report", "report_digits", "save", "final_result", "record_reading", "submit", "Digits", "count_digits")
TOOL_RESULTS = (
    "ok",
    "OK",
    "done",
    "saved",
    "true",
    "null",
    '{"ok": true}',
    '{"status": "ok"}',
    "Final result processed.",
    "",
)

PUBLISHED_WATCH = WATCH[0]
PUBLISHED_SYSTEM = SYSTEM[1]


def vocabulary_text() -> list[str]:
    """Return everything that should tokenise into few tokens."""
    roles = ["system\n", "user\n", "assistant\n"] * 50
    phrases = [*READ, *COUNT, *FIRST, *LAST, *BEFORE, *CHANGES, NO_IMAGE, NOTHING, MANY, *SYSTEM, *WATCH, *SMALL_TALK]
    names = [*COUNT_NAMES, *FIRST_NAMES, *LAST_NAMES, *LIST_NAMES, *TEXT_NAMES, *OBJECT_NAMES, *TOOL_NAMES]
    marks = [
        '<tool_call>\n{"name": "report", "arguments": {"count": integer, "digits": [integer], "text": string}}\n'
        "</tool_call>",
        "<tool_response>\nok\n</tool_response>\n<tools>\n</tools>",
        '{"result": {"digits": [3, 7, 1], "text": "3", "count": 3}}',
        '{"count": 3, "digits": [1]}',
    ]
    digits = [f"{first} {second}" for first in range(10) for second in range(10)] * 20
    return (
        roles + [*phrases, *SYSTEM, *WATCH] * 20 + [*READ_JSON, *COUNT_JSON, *REPORT, *names] * 12 + marks * 60 + digits
    )
