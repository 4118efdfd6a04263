"""Synchronous views that have work done by the worker service."""

import functools
import os

import wove
from django.db import transaction
from django.http import JsonResponse
from django.views.decorators.http import require_GET, require_POST

from wove_ws_sync.contrib.django import executor, submit_on_commit

from . import tasks
from .models import Order


def answers_503(view):
    """Have a view answer 503 while the worker service is down, whatever it was doing there."""

    @functools.wraps(view)
    def wrapped(request, *args, **kwargs):
        try:
            return view(request, *args, **kwargs)
        except (ConnectionError, wove.DeliveryTimeoutError) as exc:
            return JsonResponse({"error": type(exc).__name__}, status=503)

    return wrapped


@require_GET
@answers_503
def report(request, number):
    """Run a weave of four tasks, all in the worker service: three at once, then the last."""
    with wove.weave(environment="workers") as w:

        @w.do
        def square():
            return tasks.square(number)

        @w.do
        def double():
            return 2 * number

        @w.do
        def worker():
            return tasks.where()

        @w.do
        def answer(square, double):
            return square + double

    return JsonResponse(
        {"number": number, "answer": w.result["answer"], "worker": w.result["worker"], "host": os.getpid()}
    )


@require_GET
@answers_503
def total(request, number):
    """Add up squares."""
    return JsonResponse({"total": sum(executor.map(tasks.square, range(number)))})


@require_POST
def order(request):
    """Save an order; its receipt is written once the transaction has committed."""
    with transaction.atomic():
        saved = Order.objects.create(amount=int(request.POST["amount"]))
        submit_on_commit(tasks.write_receipt, saved.pk)
    return JsonResponse({"order": saved.pk}, status=201)
