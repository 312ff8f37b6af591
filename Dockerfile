# The worker image of docker-compose.yml: Wove, Celery and RQ, installed from this repository. What the
# three workers do differently stands in their `command` there.
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# Where pip finds packages, for those who need a mirror; docker-compose.yml hands over what is set outside.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST

ENV PYTHONUNBUFFERED=1

COPY . /src
RUN python -m pip install --quiet --no-cache-dir --timeout 60 \
        --disable-pip-version-check --root-user-action=ignore "/src[celery,rq]" \
    && rm -rf /src

# Workers run other people's functions: they have no business being root.
RUN useradd --create-home wove
USER wove
WORKDIR /home/wove
