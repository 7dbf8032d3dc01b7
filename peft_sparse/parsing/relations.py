"""The relations of Universal Dependencies, in the order of the published parsers' outputs."""

from __future__ import annotations

_NAMES = """
_ acl advcl advmod amod appos aux case cc ccomp clf compound conj cop csubj dep det discourse dislocated expl fixed flat
goeswith iobj list mark nmod nsubj nummod obj obl orphan parataxis punct reparandum root vocative xcomp
"""
# Without subtypes; "_" is what a treebank says of a word that has none. From the training scripts of composable-sft.
RELATIONS = tuple(_NAMES.split())
