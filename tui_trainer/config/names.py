"""Names for runs that people can read, say and type."""

from __future__ import annotations

import secrets

ADJECTIVES = """
    able agile amber ample bold brave brisk bright calm clear clever crisp deft eager early easy
    fair fast fine firm fleet fresh gentle glad golden good grand green happy hardy honest jolly
    keen kind light lively lucky mellow merry mild neat nimble noble open patient plain proud quick
    quiet rapid ready rosy royal sharp silent silver smart smooth snug solid steady still sunny sure
    swift tidy true vivid warm wise witty
"""

NOUNS = """
    badger beaver bison crane cricket curlew dolphin dove eagle egret falcon ferret finch fox gecko
    gibbon goose grouse hare hawk heron ibex ibis jackal jay kestrel kite koala lark lemur linnet
    lizard llama lynx magpie marlin marmot marten merlin mole moose newt ocelot octopus orca oriole
    osprey otter owl panda parrot pelican perch pigeon plover puffin quail rabbit raven robin salmon
    seal shrew sparrow squid stork swallow swan tern thrush toad trout turtle viper walrus weasel
    whale wombat wren zebra
"""


def random_name() -> str:
    """Such as `quiet-otter`; drawn from the system's randomness, never from a seeded generator."""
    return f"{secrets.choice(ADJECTIVES.split())}-{secrets.choice(NOUNS.split())}"
