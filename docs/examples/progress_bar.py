"""``map`` with a progress bar (pip install "wove_ws_sync[progress]")."""

from tqdm import tqdm

from wove_ws_sync import WebSocketExecutor, current_run
from wove_ws_sync.progress import track
from wove_ws_sync.testing import LoopbackWorker


def square(number):
    return number * number


def sum_of(numbers):
    run = current_run()
    total = 0
    for done, number in enumerate(numbers, 1):
        total += number
        run.progress(done, len(numbers))
    return total


def main():
    with LoopbackWorker() as worker, WebSocketExecutor(**worker.config) as pool:
        numbers = range(2000)

        # The results of map come in order, and so the bar is of what has come in order.
        results = list(tqdm(pool.map(square, numbers, buffersize=500), total=len(numbers), desc="map"))
        print(sum(results))

        # track counts whatever has ended, with the part that running tasks report.
        futures = [pool.submit(sum_of, results[start::4]) for start in range(4)]
        print(sum(future.result() for future in track(futures, description="sums")))


if __name__ == "__main__":
    main()
