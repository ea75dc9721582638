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
NO_IMAGE = "There is no image yet."
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

PUBLISHED_WATCH = WATCH[0]
PUBLISHED_SYSTEM = SYSTEM[1]


def vocabulary_text() -> list[str]:
    """Returns everything that should tokenise into few tokens."""
    roles = ["system\n", "user\n", "assistant\n"] * 50
    phrases = [*READ, *COUNT, *FIRST, NO_IMAGE, *SYSTEM, *WATCH, *SMALL_TALK]
    digits = [f"{first} {second}" for first in range(10) for second in range(10)] * 20
    return roles + phrases * 20 + digits
