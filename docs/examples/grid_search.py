"""scikit-learn's grid search on a worker service (pip install "wove_ws_sync[joblib]" scikit-learn)."""

from joblib import parallel_config
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from wove_ws_sync.contrib.joblib import register
from wove_ws_sync.testing import LoopbackWorker

register()


def main():
    features, labels = load_iris(return_X_y=True)
    search = GridSearchCV(SVC(), {"C": [0.1, 1, 10], "gamma": [0.01, 0.1, 1]}, cv=3)
    with LoopbackWorker(workers=2, args=["--engine", "processes"]) as worker:
        with parallel_config("wove_ws", **worker.config):
            search.fit(features, labels)
    print(search.best_params_, round(search.best_score_, 2))


if __name__ == "__main__":
    main()
