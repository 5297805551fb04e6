"""Lines are kept as they are logged, and only in the context."""

import logging

from hqqtrain.common.kept_log import kept_log


def test_lines_of_the_context(caplog):
    caplog.set_level("INFO", logger="hqqtrain")
    logger = logging.getLogger("hqqtrain.data.some_module")
    logger.info("before")
    with kept_log() as lines:
        logger.warning("%d of %d", 3, 4)
        logger.info("a %s")
        logger.debug("not shown either")
        logging.getLogger("another").warning("of another library")
    logger.info("after")
    assert lines == [(logging.WARNING, "3 of 4"), (logging.INFO, "a %s")]
    assert "3 of 4" in caplog.text
