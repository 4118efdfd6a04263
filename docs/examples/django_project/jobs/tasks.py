"""Functions that the worker service runs; it has Django set up, and this module."""

import os

from .models import Order


def square(number):
    """Return the square."""
    return number * number


def where():
    """Return the id of the process that runs this."""
    return os.getpid()


def write_receipt(order_id):
    """Write a receipt for an order, with the ORM, in the worker service."""
    order = Order.objects.get(pk=order_id)
    order.receipt = f"{order.amount} paid"
    order.save(update_fields=["receipt"])
    return order.receipt
