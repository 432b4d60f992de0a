# SPDX-License-Identifier: Apache-2.0
"""Servers that the files of this folder share the making of."""

import pytest

from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers


@pytest.fixture(scope="module")
def hermes():
    """A model with tools as Hermes JSON."""
    model = fake_engine.model(chat_templates.HERMES)
    with servers.running(model, scripts.SCRIPT) as one:
        yield one


@pytest.fixture(scope="module")
def thinking():
    """A model that thinks, with tools as tags; its prompt opens the thinking."""
    model = fake_engine.model(chat_templates.TAGS)
    script = scripts.SCRIPT | {
        "think hard": "First 1.\n\nThen 2.\n</think>\n\nThe answer.",
        "tagged weather?": "Ulm.\n</think>\n\n" + scripts.TAGGED,
        "sunny": "Ulm\n</parameter>\n",  # what the tags leave open
        "as json": 'Hm {}.</think>{"name": "Ada", "age": 36}',
    }
    with servers.running(model, script) as one:
        yield one


@pytest.fixture()
def client(hermes):
    hermes.engine.cached = 0
    return hermes.client()
