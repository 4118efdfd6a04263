"""How a project tests what it has a worker service do: ``python manage.py test``."""

from django.test import TestCase, TransactionTestCase

from jobs.models import Order
from wove_ws_sync.contrib.django.testing import DjangoWorker, immediate


@immediate()
class OrderTests(TestCase):
    """In process: tasks see the transaction of the test."""

    def test_receipt(self):
        """The receipt is written when the transaction commits."""
        with self.captureOnCommitCallbacks(execute=True):
            self.client.post("/orders/", {"amount": 12})
        self.assertEqual(Order.objects.get().receipt, "12 paid")


class WorkerTests(TransactionTestCase):
    """On a real worker service, which uses the test database."""

    def test_receipt_and_total(self):
        """Views and tasks share the database; when the worker service is gone the view says so."""
        with DjangoWorker() as worker, worker.settings(DELIVERY_TIMEOUT=5.0):
            self.assertEqual(self.client.get("/total/5/").json(), {"total": 30})
            self.assertEqual(self.client.get("/report/3/").json()["worker"], worker.pid)
            worker.kill()
            self.assertEqual(self.client.get("/total/5/").status_code, 503)
            self.assertEqual(self.client.get("/report/3/").status_code, 503)
