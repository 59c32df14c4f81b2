"""What the paper's evaluation says to a model beside the questions.

The paper's code (thunlp/FR-Spec, evaluation/) puts Spec-Bench and HumanEval into the model's chat
template below a system message, and GSM8K as a plain text of eight solved examples.
"""

from __future__ import annotations

# The default system message of Llama 2 (arXiv 2307.09288), which EAGLE's evaluation gives every
# model; the two spaces in it are its own.
SPEC_BENCH_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible,"
    " while being safe.  Your answers should not include any harmful, unethical, racist, sexist,"
    " toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased"
    " and positive in nature.\n\nIf a question does not make any sense, or is not factually"
    " coherent, explain why instead of answering something not correct. If you don't know the"
    " answer to a question, please don't share false information."
)

HUMAN_EVAL_SYSTEM = (
    "Please complete the following Python code without providing any additional tasks such as"
    " testing or explanations"
)

# The eight examples of chain-of-thought prompting (Wei et al., arXiv 2201.11903, table 20):
# question, reasoning, answer.
_EXAMPLES = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After"
        " they are done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So"
        " there must have been 21 - 15 = 6.",
        "6",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the"
        " parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5.",
        "5",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have"
        " left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74."
        " After eating 35, they had 74 - 35 = 39.",
        "39",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many"
        " lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave"
        " Denny 20 - 12 = 8.",
        "8",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many"
        " toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more"
        " toys. 5 + 4 = 9.",
        "9",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day,"
        " from monday to thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So"
        " 5 * 4 = 20 computers were added. 9 + 20 is 29.",
        "29",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2"
        " more. How many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After"
        " losing 2 more, he had 35 - 2 = 33 golf balls.",
        "33",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has"
        " 23 - 15 dollars left. 23 - 15 is 8.",
        "8",
    ),
)
ANSWER_TRIGGER = "The answer is"


def gsm8k_prompt(question: str) -> str:
    """The eight examples and the question, for a model to go on from "A:"."""
    examples = "".join(
        f"Q: {asked}\nA: {reasoning} {ANSWER_TRIGGER} {answer}.\n\n"
        for asked, reasoning, answer in _EXAMPLES
    )
    return f"{examples}Q: {question}\nA:"
