/* One team of threads for everything. Its members share the work of a phase by drawing numbers, so that one that the
   system delays holds nobody up, and meet between phases by spinning: a token has hundreds of phases of microseconds.
   Between calls they sleep. */

typedef struct Team Team;
typedef void (*Job)(Team *team, int member, void *argument);

struct Team {
    int size;
    pid_t owner;
    pthread_mutex_t lock;
    pthread_cond_t called;
    unsigned calls;
    Job job;
    void *argument;
    atomic_uint phase;
    atomic_int arrived;
    atomic_long next;
};

enum { SPINS = 2000 }; /* then the processor is offered to others: there may be fewer cores than threads */

static inline void meet(Team *team)
{
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->size) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->next, 0);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS) __builtin_ia32_pause();
        else sched_yield();
    }
}

/* The number of the next piece of work of this phase; the phase ends with `meet`. */
static inline long draw(Team *team) { return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed); }

typedef struct { Team *team; int member; } Membership;

static inline void *serve(void *given)
{
    Membership own = *(Membership *)given;
    free(given);
    unsigned seen = 0;
    for (;;) {
        pthread_mutex_lock(&own.team->lock);
        while (own.team->calls == seen) pthread_cond_wait(&own.team->called, &own.team->lock);
        seen = own.team->calls;
        pthread_mutex_unlock(&own.team->lock);
        own.team->job(own.team, own.member, own.team->argument);
        meet(own.team);
    }
    return NULL;
}

/* A team that lasts as long as the process; NULL if the system gives no threads. */
static inline Team *new_team(int size)
{
    Team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->size = size;
    team->owner = getpid();
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->called, NULL);
    for (int member = 1; member < size; member++) {
        Membership *own = malloc(sizeof *own);
        pthread_t thread;
        if (!own) return NULL;
        *own = (Membership){team, member};
        if (pthread_create(&thread, NULL, serve, own)) return NULL;
        pthread_detach(thread);
    }
    return team;
}

/* Let every member do the job; returns when all have. */
static inline void work(Team *team, Job job, void *argument)
{
    team->job = job;
    team->argument = argument;
    if (team->size > 1) {
        pthread_mutex_lock(&team->lock);
        team->calls++;
        pthread_cond_broadcast(&team->called);
        pthread_mutex_unlock(&team->lock);
    }
    job(team, 0, argument);
    meet(team);
}
