"""One place for the settings of weaves and of the futures executor: ``environment=``."""

import wove

import wove_ws_sync
from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker


def shout(text):
    return text.upper()


def main():
    with LoopbackWorker() as worker:
        wove_ws_sync.config(
            default_environment="far",
            environments={
                "far": {
                    "executor": "websocket",
                    "executor_config": worker.config,
                    "delivery_timeout": 30.0,
                },
            },
        )

        with wove.weave() as w:

            @w.do
            def greeting():
                return shout("from a weave")

        print(w.result.greeting)

        # The same connection, with the delivery settings of the environment.
        with WebSocketExecutor(environment="far") as pool:
            print(pool.submit(shout, "from a future").result())


if __name__ == "__main__":
    main()
