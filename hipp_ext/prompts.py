"""The words of questions, as VLMEvalKit writes them."""

from collections.abc import Mapping


def choice_prompt(question: str, options: Mapping[str, object], hint: str = "") -> str:
    """The prompt of a multiple-choice question: hint, question, options, request to choose.

    Args:
        question: the question.
        options: letter -> text of the option.
        hint: what stands before the question; "": nothing.
    """
    lines = [f"Hint: {hint}"] * bool(hint) + [f"Question: {question}", "Options:"]
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join(lines) + "\nPlease select the correct answer from the options above. \n"
