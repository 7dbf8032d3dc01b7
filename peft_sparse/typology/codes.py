"""Language codes: which spellings mean the same language, and which language stands for a group of them."""

from __future__ import annotations

import re

GLOTTOCODE = re.compile(r"[a-z0-9]{4}[0-9]{4}")


def _pairs(text: str) -> dict[str, str]:
    return {pair.partition(":")[0]: pair.partition(":")[2] for pair in text.split()}


# Kept here rather than taken from a package: the two-letter set is closed, and a generated adapter must not depend on
# which package of codes happens to be installed. Source: ISO 639-1; the last line holds its withdrawn codes.
ISO_639_1 = _pairs("""
    aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis
    bm:bam bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu
    dv:div dz:dzo ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry
    ga:gle gd:gla gl:glg gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina
    id:ind ie:ile ig:ibo ii:iii ik:ipk io:ido is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz
    kl:kal km:khm kn:kan ko:kor kr:kau ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao
    lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde
    ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol
    ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin sa:san sc:srd sd:snd se:sme sg:sag sh:hbs si:sin sk:slk
    sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe sw:swa ta:tam te:tel tg:tgk th:tha ti:tir
    tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzb ve:ven vi:vie vo:vol
    wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
    in:ind iw:heb ji:yid jw:jav mo:ron
""")

# ISO 639-2 has two codes for these; the bibliographic one is not a code of ISO 639-3.
ISO_639_2_B = _pairs("""
    alb:sqi arm:hye baq:eus bur:mya chi:zho cze:ces dut:nld fre:fra geo:kat ger:deu gre:ell ice:isl mac:mkd mao:mri
    may:msa per:fas rum:ron slo:slk tib:bod wel:cym
""")

# Codes of groups that data sets use as if they were languages, and the languages that stand for them, best first.
# nah and oto (AmericasNLI, thesis table B.1) and btk (NusaWrites) are in no typological table; the others are
# macrolanguages. nhd is no Nahuatl: it is Chiripá, a Guarani language.
STAND_INS = {
    "nah": ("nhe", "nhn", "nci"),
    "oto": ("ote", "otm"),
    "btk": ("bbc",),
    "aym": ("ayr",),
    "grn": ("gug",),
    "bua": ("bxr",),
    "msa": ("zsm",),
    "swa": ("swh",),
}
_MEMBERS = {member: group for group, members in STAND_INS.items() for member in members}
_SHORT = {long: short for short, long in reversed(ISO_639_1.items())}


def is_glottocode(code: str) -> bool:
    """Whether a code has the form of a Glottocode, such as "stan1293"."""
    return GLOTTOCODE.fullmatch(code) is not None


def spellings(code: str) -> list[str]:
    """The codes of the same language, as written first; none of them need be in any table.

    Args:
        code: ISO 639-1, 639-2 or 639-3, in any case; a script or region after "-" or "_" is left out ("eng_Latn").
    """
    plain = re.split(r"[-_]", code.strip().lower(), maxsplit=1)[0]
    long = ISO_639_1.get(plain) or ISO_639_2_B.get(plain) or plain
    found = [code, plain, long]
    if long in _SHORT:
        found.append(_SHORT[long])
    return list(dict.fromkeys(found))


def stand_ins(code: str) -> list[str]:
    """Codes of other languages that stand for one that a table lacks, best first: members of a group, or the group."""
    found: list[str] = []
    for spelling in spellings(code):
        found += STAND_INS.get(spelling, ())
        if spelling in _MEMBERS:
            found.append(_MEMBERS[spelling])
    return [spelling for other in dict.fromkeys(found) for spelling in spellings(other)]
