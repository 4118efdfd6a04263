"""Addresses of the example project."""

from django.urls import path
from jobs import views

urlpatterns = [
    path("report/<int:number>/", views.report),
    path("total/<int:number>/", views.total),
    path("orders/", views.order),
]
