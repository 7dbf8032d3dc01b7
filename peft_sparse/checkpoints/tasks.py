"""What PEFT's task types (`task_type` of a config) stand for."""

from __future__ import annotations

# The class of transformers that loads a base model for the task.
BASE_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# What PEFT's model classes for these tasks add to `modules_to_save`, whatever a config says (peft/peft_model.py).
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
