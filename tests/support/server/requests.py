"""What clients ask of a served model again and again, and how they are refused."""

import pytest
from tritonclient.utils import InferenceServerException

A = {"text_input": "a"}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "does", "not", "mind", "stop", "page"]
GREEDY = {"temperature": 0.0, "max_tokens": 24}
COUNTS = {"return_num_output_tokens": True, "return_total_output_tokens": True, "return_finish_reason": True}


def refused(message):
    return pytest.raises(InferenceServerException, match=message)
